"""Chooses measure and exits on the tuning split: what is worth certifying."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.promise import Limits
from ojfa_export.promises.outcomes import Costs, Outcome
from ojfa_export.promises.path import Path, paths
from ojfa_export.promises.statistics import ExitStatistics

# Fewer exits mean fewer checks and engines' stops: one more must be worth this share of the cost.
WORTHWHILE = 0.005


def slack(confidence: float, windows: int) -> float:
    """About what so many windows can't tell from a limit, as a share of tokens."""
    return -math.log1p(-confidence) / windows


def exits_to_certify(
    tuning: ExitStatistics,
    limits: Limits,
    others: Sequence[float],
    costs: Costs,
    windows: int,
) -> tuple[int, ...]:
    """The exits that certification has to look at.

    What `certify` would choose among every exit is among them, as it chooses on the tuning split
    alone; so nothing cheaper is missed, and all that is certified is fresh text.

    Args:
        tuning: Of every exit.
        limits: What is promised.
        others: Shares of tokens that may differ, for which a plan asks too.
        costs: Of a token.
        windows: Of the domain that has fewest for certification.

    Returns:
        Blocks run, rising; none where no exits save time within the limits on the tuning split, so
        that there is nothing to certify.
    """
    below = slack(limits.confidence, windows)
    path = choose_path(tuning, limits, costs, below)
    if path is None:
        return ()
    exits = set(path.exits)
    for share in others:
        asked = Limits(max_disagreement=share, confidence=limits.confidence)
        path = choose_path(tuning, asked, costs, below)
        exits.update(() if path is None else path.exits)
    return tuple(sorted(exits))


def choose_path(tuning: ExitStatistics, limits: Limits, costs: Costs, slack: float) -> Path | None:
    """The measure and the exits that are cheapest within the limits, on the tuning split.

    Exits are added greedily.

    Args:
        tuning: The split to choose on.
        limits: What is promised.
        costs: Of a token.
        slack: To stay below the limits by: about ln(1 / (1 - confidence)) / windows is what
            certification needs.

    Returns:
        None where full depth is the cheapest.
    """
    targets = [max(0.0, limit - slack) for limit in limits.shares()]
    best_path: Path | None = None
    best = costs.full
    for everything in paths(tuning):
        chosen: tuple[int, ...] = ()
        cheapest = costs.full
        while len(chosen) < len(everything.exits):
            options = [
                tuple(sorted((*chosen, depth))) for depth in everything.exits if depth not in chosen
            ]
            prices = [
                _price(everything.only(exits), tuning, limits, targets, costs) for exits in options
            ]
            index = int(np.argmin(prices))
            if prices[index] >= cheapest * (1 - WORTHWHILE):
                break
            chosen, cheapest = options[index], prices[index]
        if chosen and cheapest < best:
            best_path, best = everything.only(chosen), cheapest
    return best_path


def most_eager(
    path: Path, tuning: ExitStatistics, limits: Limits, targets: list[float], costs: Costs
) -> int | None:
    """The most eager step that keeps the targets in every domain, found by bisection."""
    members = tuning.members()
    low, high = -1, path.steps
    while high - low > 1:
        step = (low + high) // 2
        seen = risks(path.apply(step, tuning, costs, limits.surprisal_clip), limits)
        kept = all(
            risk[rows].mean() <= target
            for risk, target in zip(seen, targets, strict=True)
            for rows in members
        )
        low, high = (step, high) if kept else (low, step)
    return None if low < 0 else low


def _price(
    path: Path, tuning: ExitStatistics, limits: Limits, targets: list[float], costs: Costs
) -> float:
    """A token's cost at the most eager step that keeps the targets."""
    step = most_eager(path, tuning, limits, targets, costs)
    if step is None:
        return costs.full
    return float(path.apply(step, tuning, costs, limits.surprisal_clip).cost.mean())


def risks(outcome: Outcome, limits: Limits) -> list[NDArray[np.float64]]:
    """The losses [W] that are limited, in the order of `Limits.shares`."""
    risks = [outcome.disagreement]
    if limits.max_extra_surprisal is not None:
        risks.append(outcome.extra_surprisal)
    return risks
