"""`ojfa-export plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ojfa_export import backends
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console, describe_hardware

if TYPE_CHECKING:
    from ojfa_export.planning.frontier import Point
    from ojfa_export.planning.plan import Plan


@define("plan")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--confidence",
    type=float,
    metavar="SHARE",
    default=0.95,
    help="With which a policy must keep its limit to count as certified.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Draw the frontier here too.",
)
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to time.")
def command(
    console: Console, bundle: Path, confidence: float, output: Path | None, backend: str
) -> None:
    """Predict what each way of running BUNDLE costs and gives here.

    Times blocks and heads here and now, and joins that with what every exit said on the
    calibration text: milliseconds per token against agreement with the full model, of fixed
    exits, of exits that decide for each token, and of speculation; and what to do.
    """
    from ojfa_export.bundle.promise import check_limits

    check_limits(0.5, confidence)
    if output is not None:
        check_picture(output)
    from ojfa_export.planning.plan import plan_bundle

    plan = plan_bundle(bundle, console.progress(), confidence, backend)
    if output is not None:
        from ojfa_export.planning.picture import frontier
        from ojfa_export.system.atomic import write_atomically

        write_atomically(output, frontier(plan.points, plan.own))
    if console.json:
        console.emit({"bundle": str(bundle), **plan.to_json()})
        return
    _show(console, plan)


def check_picture(path: Path) -> None:
    """Refuses what can't be drawn before anything is measured.

    Raises:
        UsageError: Another ending than .png, or matplotlib isn't installed.
        OSError: It can't be written.
    """
    from importlib.util import find_spec

    from ojfa_export.errors import UsageError
    from ojfa_export.system.atomic import check_writable

    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} is no PNG file by its name", hint="call it frontier.png")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "a picture needs matplotlib, which is not installed",
            hint="pip install 'ojfa-export[build]'",
        )
    check_writable(path)


def _show(console: Console, plan: Plan) -> None:
    machine, full = plan.machine, plan.costs.full
    console.facts(
        {
            **describe_hardware(machine),
            "full depth": f"{full:.3f} ms per token, measured",
            "text": _text(plan),
        }
    )
    console.print()
    console.table(
        ("way", "ms/token", "of full", "agrees", "worst domain", "blocks/token", ""),
        [_row(point, full) for point in _shown(plan)],
    )
    console.print()
    for line in plan.advice:
        console.print(line)
    console.print(f"Default here: {plan.default.reason}.")


def _text(plan: Plan) -> str:
    """What text the agreements are of, in words."""
    said = f"{plan.tokens:,} tokens from {plan.windows} windows"
    own = {(p.tokens, p.windows) for p in [*plan.points, plan.own] if p and p.kind == "auto"}
    for tokens, windows in sorted(own - {(plan.tokens, plan.windows)}):
        said += f"; exits per token that were certified, {tokens:,} from {windows}"
    return said


def _shown(plan: Plan) -> list[Point]:
    """Of speculation, the best length of the three best exits."""
    drafting = sorted((p for p in plan.points if p.kind == "speculation"), key=lambda p: p.ms)
    best = {point.exit: point for point in reversed(drafting)}
    others = [point for point in plan.points if point.kind != "speculation"]
    own = [] if plan.own is None else [plan.own]
    return [*others, *own, *sorted(best.values(), key=lambda point: point.ms)[:3]]


def _row(point: Point, full: float) -> tuple[str, ...]:
    certified = {None: "", True: "certified", False: "estimate"}[point.certified]
    return (
        point.name,
        f"{point.ms:.3f}",
        f"{100 * point.ms / full:.0f}%",
        f"{100 * point.agreement:.1f}%",
        f"{100 * point.worst_agreement:.1f}%",
        f"{point.blocks:.1f}",
        certified if point.kind == "auto" else "lossless" if point.agreement == 1 else "",
    )
