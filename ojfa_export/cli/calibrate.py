"""`ojfa-export calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ojfa_export.cli.checkpoint_options import (
    calibration_options,
    checkpoint_options,
    kind_option,
    overwrite_option,
)
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console


@define("calibrate")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="The shortcut to write (safetensors).",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the report (JSON, HTML and pictures).",
)
@calibration_options
@kind_option
@checkpoint_options
@overwrite_option
def command(
    console: Console, checkpoint: str, output: Path, report: Path | None, **settings: Any
) -> None:
    """Fit the early-exit shortcut of CHECKPOINT.

    CHECKPOINT is a Hugging Face model directory or hub id.
    """
    from ojfa_export.compiler.options import BuildOptions
    from ojfa_export.compiler.parts import calibrate_only

    options = BuildOptions(checkpoint=checkpoint, output=output, **settings)
    result = calibrate_only(options, console.progress(), report=report)
    if console.json:
        console.emit(result)
    else:
        console.facts(result)
