"""`ojfa-export verify`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ojfa_export import backends
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from ojfa_export.verify.check import Check


@define("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="CHECKPOINT",
    help="Compare with transformers running this model directory or hub id in fp32.",
)
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Tolerance in place of each comparison's own; recorded tokens must be equal all the same.",
)
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to check.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Let transformers run code in the checkpoint."
)
def command(
    console: Console,
    bundle: Path,
    against: str | None,
    atol: float | None,
    backend: str,
    revision: str | None,
    trust_remote_code: bool,
) -> int:
    """Check that BUNDLE computes what it should, on this machine.

    Its engines must reproduce the tokens recorded when it was built, and every block and head must
    give what float64 gives on the bundle's own weights; in fp16 nothing may be beyond what that
    holds. Checks come in the order of the computation: the first that failed says where it began.
    Exit status 3 means that a check failed.

    Of quantised weights float64 takes what they stand for. With --against they must be the
    checkpoint's to half a step; how far the model has moved is a figure, and no check.
    """
    from ojfa_export.verify.verify import (
        can_compare_blocks,
        open_model,
        quantisation_change,
        verify_model,
    )

    if atol is not None and not math.isfinite(atol):
        raise UsageError(
            f"--atol must be a finite number, not {atol}", hint="leave it out, or try --atol 1e-3"
        )
    model = open_model(bundle, backend)
    checks = verify_model(
        model,
        against,
        backend,
        console.progress(),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if atol is not None:
        checks = [_with_tolerance(check, atol) for check in checks]
    failed = [check for check in checks if not check.passed]
    change = None
    if against is not None:
        change = quantisation_change(
            model,
            against,
            console.progress(),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if console.json:
        figures = {} if change is None else {"change": change.model_dump()}
        checked = [check.model_dump() for check in checks]
        console.emit({"passed": not failed, "checks": checked, **figures})
    else:
        _show(console, checks)
        outcome = f"{len(failed)} of {len(checks)} checks failed" if failed else "all checks passed"
        console.note(outcome)
        if change is not None:
            console.note(f"quantised: {change}")
        if not can_compare_blocks():
            console.note("blocks were not compared with float64: pip install 'ojfa-export[build]'")
    return ExitStatus.VERIFICATION if failed else ExitStatus.OK


def _with_tolerance(check: Check, atol: float) -> Check:
    """The check with another tolerance; what must be equal (tolerance 0) stays so."""
    if check.tolerance == 0:
        return check
    return check.model_copy(update={"tolerance": atol, "passed": check.max_abs_diff <= atol})


def _show(console: Console, checks: list[Check]) -> None:
    console.table(
        ("check", "max abs diff", "tolerance", ""),
        [
            (
                check.name,
                f"{check.max_abs_diff:.3g}",
                f"{check.tolerance:.3g}",
                "ok" if check.passed else "FAILED",
            )
            for check in checks
        ],
    )
