"""`ojfa-export export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ojfa_export.cli.checkpoint_options import checkpoint_options, graph_options, overwrite_option
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console


@define("export")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder for the graphs and weights.",
)
@click.option(
    "--shortcut",
    "shortcuts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE|DIR",
    help="Shortcut to make the exit head of, without which there is none; or a draft layer, of a "
    "file or an EAGLE-3 directory. Once for each.",
)
@graph_options
@checkpoint_options
@overwrite_option
def command(
    console: Console, checkpoint: str, output: Path, shortcuts: tuple[Path, ...], **settings: Any
) -> None:
    """Write the portable ONNX graphs of CHECKPOINT.

    CHECKPOINT is a Hugging Face model directory or hub id.
    """
    from ojfa_export.compiler.options import BuildOptions
    from ojfa_export.compiler.parts import export_only

    options = BuildOptions(checkpoint=checkpoint, output=output, **settings)
    result = export_only(options, shortcuts, console.progress())
    if console.json:
        console.emit(result)
    else:
        console.facts(result)
