"""What to do with a frontier: the default, and the reasons in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ojfa_export.decoding.default import Default
from ojfa_export.planning.frontier import Point, as_speculation
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.statistics import ExitStatistics, split_with

# Predictions are within about this share of what is measured: less than that is no gain.
MARGIN = 0.1
# Early exit is worth it if so few tokens may differ and it still saves MARGIN.
MODEST = 0.05


def choose_default(
    points: Sequence[Point],
    own: Point | None,
    splits: Mapping[str, ExitStatistics],
    costs: StepCosts,
) -> Default:
    """The fastest way that gives the tokens of full depth, or keeps the promise that was asked.

    Full depth, unless another way saves MARGIN; speculation, unless the promise saves that again.

    Args:
        points: The frontier.
        own: The bundle's policy, if it has one with a promise.
        splits: Of the statistics.
        costs: Of steps.
    """
    full = _only(points, "full")
    chosen, speculation = full, None
    drafting = _fastest(points, "speculation")
    if drafting is not None and _saves(drafting, full):
        every = split_with(splits, splits["tuning"].exits)
        chosen, speculation = drafting, as_speculation(drafting, every, costs)
    if own is not None and _saves(own, chosen):
        chosen, speculation = own, None
    return Default(
        exit="auto" if chosen is own else "full",
        speculation=speculation,
        ms_per_token=chosen.ms,
        full_ms_per_token=full.ms,
        reason=_why(chosen, full),
    )


def advice(points: Sequence[Point], own: Point | None) -> list[str]:
    """What the frontier says, the verdict first."""
    full = _only(points, "full")
    drafting = _fastest(points, "speculation")
    lines = []
    worth = drafting is not None and _saves(drafting, full)
    if drafting is not None:
        lines.append(_about_drafting(drafting, full))
    per_token = [point for point in points if point.kind == "auto"]
    cheap = [point for point in per_token if _saves(point, full)]
    worth = worth or any(point.limit is not None and point.limit <= MODEST for point in cheap)
    lines.append(_about_policies(per_token, cheap, full))
    if own is not None:
        lines.append(
            f"This bundle's own policy takes {_change(own, full)} and agrees in "
            f"{own.agreement:.1%} of the tokens."
        )
    lines.append(_about_fixed([p for p in points if p.kind == "fixed"], full))
    verdict = (
        "Early exit pays on this model and machine."
        if worth
        else "Early exit is not worth it on this model and machine: nothing that gives the tokens "
        f"of full depth, or all but {MODEST:.0%} of them, saves {MARGIN:.0%} of the time. Run it "
        "at full depth."
    )
    return [verdict, *lines]


def _about_drafting(drafting: Point, full: Point) -> str:
    pays = "pays" if _saves(drafting, full) else "doesn't pay"
    return (
        f"Speculation {pays}: {drafting.draft} tokens drafted by {drafting.drafts_from} would take "
        f"{_change(drafting, full)}, for the very tokens of full depth."
    )


def _about_policies(per_token: list[Point], cheap: list[Point], full: Point) -> str:
    if not per_token:
        return "Exits per token save nothing, however many tokens may differ."
    if not cheap:
        best = min(per_token, key=lambda point: point.ms)
        return (
            f"Exits per token don't pay: even if {best.limit:.0%} of the tokens may differ, they "
            f"take {_change(best, full)}."
        )
    first = min(cheap, key=lambda point: point.limit or 0)
    shown = "" if first.certified else "; that is an estimate, to be certified with more text"
    return (
        f"Exits per token pay if {first.limit:.0%} of the tokens may differ: they take "
        f"{_change(first, full)}{shown}."
    )


def _about_fixed(fixed: list[Point], full: Point) -> str:
    quick = [point for point in fixed if _saves(point, full)]
    if not quick:
        return "No fixed exit saves time worth mentioning."
    best = max(quick, key=lambda point: point.agreement)
    return (
        f"Of the fixed exits that save {MARGIN:.0%} or more, exit {best.exit} agrees most: in "
        f"{best.agreement:.1%} of the tokens, at {_change(best, full)}."
    )


def _why(chosen: Point, full: Point) -> str:
    if chosen is full:
        return f"full depth: nothing within what was asked saves {MARGIN:.0%} of the time"
    return f"{chosen.name}: {_change(chosen, full)}"


def _change(point: Point, full: Point) -> str:
    change = point.ms / full.ms - 1
    return f"{point.ms:.3g} ms instead of {full.ms:.3g} ms per token ({change:+.0%})"


def _saves(point: Point, other: Point) -> bool:
    return point.ms <= (1 - MARGIN) * other.ms


def _only(points: Sequence[Point], kind: str) -> Point:
    return next(point for point in points if point.kind == kind)


def _fastest(points: Sequence[Point], kind: str) -> Point | None:
    return min((p for p in points if p.kind == kind), key=lambda point: point.ms, default=None)
