"""`ojfa-export compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ojfa_export.cli.checkpoint_options import (
    calibration_options,
    checkpoint_options,
    overwrite_option,
)
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.readable import readable_bytes

if TYPE_CHECKING:
    from ojfa_export.shortcuts.comparison.model import Comparison


@define("compare")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder to write: JSON, HTML and pictures.",
)
@click.option(
    "--skip-descent", is_flag=True, help="Don't train narrow jumps by gradient descent as well."
)
@click.option(
    "--with",
    "given",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A shortcut to show beside them, as 'train' and 'calibrate' write them; repeatable.",
)
@calibration_options
@checkpoint_options
@overwrite_option
def command(
    console: Console,
    checkpoint: str,
    output: Path,
    skip_descent: bool,
    given: tuple[Path, ...],
    **settings: Any,
) -> None:
    """Compare every kind of shortcut on CHECKPOINT.

    CHECKPOINT is a Hugging Face model directory or hub id. All kinds are fitted on the same text
    and measured at every exit on text held out; the claims made for them are judged by the figures.
    """
    from ojfa_export.compiler.compare import compare_shortcuts
    from ojfa_export.compiler.options import BuildOptions

    options = BuildOptions(checkpoint=checkpoint, output=output, **settings)
    report = compare_shortcuts(options, not skip_descent, console.progress(), given)
    if console.json:
        console.emit({"directory": str(output), **report.model_dump(mode="json")})
        return
    _show(console, report)
    console.print()
    console.print(f"report: {output / 'comparison.html'}")


def _show(console: Console, report: Comparison) -> None:
    console.heading(
        f"{report.model}, rank {report.rank}, {report.tokens_measured:,} held-out tokens: "
        "means over all exits"
    )
    console.table(
        (
            "shortcut",
            "P@1",
            "P@5",
            "P@10",
            "nats",
            "parameters",
            "bytes",
            "check reads",
            "check ms",
        ),
        [
            (
                each.title + (f" ({each.fitted_at})" if each.fitted_at else ""),
                *(f"{100 * each.mean(f'precision_at_{k}'):.1f}%" for k in (1, 5, 10)),
                f"{each.mean('surprisal'):.2f}",
                f"{each.parameters:,}",
                readable_bytes(each.bytes),
                readable_bytes(each.check.bytes_read),
                f"{each.check.milliseconds:.3f}",
            )
            for each in report.kinds
        ],
    )
    for claim in report.claims:
        console.print()
        console.print(f"{'holds' if claim.holds else 'does not hold'}: {claim.statement}")
        console.print(f"  {claim.evidence}")
