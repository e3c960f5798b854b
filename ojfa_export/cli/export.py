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
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Shortcut to make the exit head of; without it there is none.",
)
@graph_options
@checkpoint_options
@overwrite_option
def command(
    console: Console, checkpoint: str, output: Path, shortcut: Path | None, **settings: Any
) -> None:
    """Write the portable ONNX graphs of CHECKPOINT.

    CHECKPOINT is a Hugging Face model directory or hub id.
    """
    from ojfa_export.compiler.options import BuildOptions
    from ojfa_export.compiler.parts import export_only

    options = BuildOptions(checkpoint=checkpoint, output=output, **settings)
    result = export_only(options, shortcut, console.progress())
    if console.json:
        console.emit(result)
    else:
        console.facts(result)
