"""Chooses a path of policies on the tuning split, and certifies one on the certification split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.promise import DomainEvidence, Limits, Promise
from ojfa_export.promises.learn_then_test import fixed_sequence, union_p_value
from ojfa_export.promises.outcomes import Costs, Outcome
from ojfa_export.promises.p_values import best_stake, betting, n_log_wealth
from ojfa_export.promises.path import Path, paths
from ojfa_export.promises.statistics import ExitStatistics

# Fewer exits mean fewer checks and engines' stops: one more must be worth this share of the cost.
WORTHWHILE = 0.005


@dataclass(frozen=True)
class Candidate:
    """A step of the path, tested.

    Attributes:
        step: Of the path.
        p_values: [domains], each the largest over the limits.
        growth: [domains], the least logarithm of the bet's wealth per window over the limits.
    """

    step: int
    p_values: tuple[float, ...]
    growth: tuple[float, ...]


def certify(
    tuning: ExitStatistics, certification: ExitStatistics, limits: Limits, costs: Costs
) -> Promise:
    """The cheapest policy of a path that is shown to keep the limits in every domain.

    Args:
        tuning: Decides measure, exits, the path and the stakes; windows apart from the others.
        certification: Touched by the tests alone.
        limits: What is promised.
        costs: Of a token; they decide what is worthwhile, not what is certified.
    """
    # What the certification split can't tell from the limits.
    windows = min(len(rows) for rows in certification.members())
    slack = -math.log1p(-limits.confidence) / windows
    path = choose_path(tuning, limits, costs, slack)
    if path is None:
        reason = (
            "full depth: on the tuning text no exits save time within the limits "
            f"({_describe(limits)})"
        )
        return _promise(None, certification, limits, costs, [], reason)
    candidates = _candidates(path, tuning, certification, limits, costs)
    count = fixed_sequence((union_p_value(each.p_values) for each in candidates), limits.confidence)
    if count == 0:
        reason = _too_little(candidates[0], certification, limits)
        return _promise(None, certification, limits, costs, [], reason)
    promise = _promise(path, certification, limits, costs, candidates[:count], None)
    if promise.relative_cost < 1:
        return promise
    # Full depth keeps every limit, whatever the certification split says of others.
    reason = (
        "full depth: the exits that could be shown to keep the limits "
        f"({_describe(limits)}) save no time"
    )
    return _promise(None, certification, limits, costs, [], reason)


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
        risks = _risks(path.apply(step, tuning, costs, limits.surprisal_clip), limits)
        kept = all(
            risk[rows].mean() <= target
            for risk, target in zip(risks, targets, strict=True)
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


def _candidates(
    path: Path,
    tuning: ExitStatistics,
    certification: ExitStatistics,
    limits: Limits,
    costs: Costs,
) -> list[Candidate]:
    """The path's steps that differ and are not full depth, in order, to the first that fails."""
    tested: list[Candidate] = []
    previous: NDArray[np.float64] | None = None
    domains = list(zip(tuning.members(), certification.members(), strict=True))
    for step, thresholds in enumerate(path.thresholds):
        same = previous is not None and np.array_equal(thresholds, previous)
        if same or not np.isfinite(thresholds).any():
            continue
        previous = thresholds
        tuned = _risks(path.apply(step, tuning, costs, limits.surprisal_clip), limits)
        seen = _risks(path.apply(step, certification, costs, limits.surprisal_clip), limits)
        p_values, growth = [], []
        for there, here in domains:
            stakes = [best_stake(t[there], x) for t, x in zip(tuned, limits.shares(), strict=True)]
            tests = list(zip(seen, limits.shares(), stakes, strict=True))
            p_values.append(union_p_value([betting(s[here], x, b) for s, x, b in tests]))
            growth.append(min(n_log_wealth(s[here], x, b) / len(here) for s, x, b in tests))
        tested.append(Candidate(step, tuple(p_values), tuple(growth)))
        if max(p_values) > 1 - limits.confidence:
            break
    return tested


def _risks(outcome: Outcome, limits: Limits) -> list[NDArray[np.float64]]:
    """The losses [W] that are limited, in the order of `Limits.shares`."""
    risks = [outcome.disagreement]
    if limits.max_extra_surprisal is not None:
        risks.append(outcome.extra_surprisal)
    return risks


def _promise(
    path: Path | None,
    certification: ExitStatistics,
    limits: Limits,
    costs: Costs,
    certified: Sequence[Candidate],
    reason: str | None,
) -> Promise:
    members = certification.members()
    outcome, policy = None, None
    if path is not None:
        outcome = path.apply(certified[-1].step, certification, costs, limits.surprisal_clip)
        policy = path.policy(certified[-1].step)
    evidence = []
    for index, (name, rows) in enumerate(zip(certification.domains, members, strict=True)):
        evidence.append(
            DomainEvidence(
                name=name,
                windows=len(rows),
                tokens=len(rows) * certification.tokens_per_window,
                disagreement=0 if outcome is None else float(outcome.disagreement[rows].mean()),
                extra_surprisal=0
                if outcome is None
                else float(outcome.extra_surprisal[rows].mean()) * limits.surprisal_clip,
                depth=certification.blocks
                if outcome is None
                else float(outcome.depth[rows].mean()),
                p_value=None if outcome is None else certified[-1].p_values[index],
            )
        )
    relative = 1.0 if outcome is None else float(outcome.cost.mean()) / costs.full
    return Promise(
        limits=limits,
        policy=policy,
        domains=tuple(evidence),
        relative_cost=relative,
        candidates=len(certified),
        reason=reason or _kept(evidence, limits, certification.blocks, relative),
    )


def _kept(evidence: list[DomainEvidence], limits: Limits, blocks: int, relative: float) -> str:
    worst = max(evidence, key=lambda each: each.disagreement)
    depth = sum(each.depth * each.windows for each in evidence) / sum(e.windows for e in evidence)
    return (
        f"{_describe(limits)}; the worst domain, {worst.name}, differs in "
        f"{worst.disagreement:.1%} of {worst.tokens:,} tokens from {worst.windows} windows; "
        f"{depth:.1f} of {blocks} blocks are run on average, at {relative:.0%} of the full cost"
    )


def _describe(limits: Limits) -> str:
    surprisal = ""
    if limits.max_extra_surprisal is not None:
        surprisal = f" and {limits.max_extra_surprisal:g} nats of extra surprisal"
    return (
        f"at most {limits.max_disagreement:.3g} of the tokens differ{surprisal}, "
        f"with confidence {limits.confidence:g}"
    )


def _too_little(candidate: Candidate, certification: ExitStatistics, limits: Limits) -> str:
    """Why not even the most careful policy was certified, and how much text would show it."""
    index = int(np.argmax(candidate.p_values))
    name, windows = certification.domains[index], len(certification.members()[index])
    said = (
        f"full depth: not even the most careful exits could be shown to keep the limits "
        f"({_describe(limits)}) in domain {name} with {windows} windows"
    )
    growth = candidate.growth[index]
    if growth <= 0:
        return f"{said}; they break them there, so that no amount of text would show it"
    needed = max(windows + 1, math.ceil(-math.log1p(-limits.confidence) / growth))
    return f"{said}; if more text is alike, about {needed} windows would"
