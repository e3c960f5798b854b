"""Certifies a policy of the path that the tuning split chose, on the certification split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.promise import DomainEvidence, Limits, Promise
from ojfa_export.promises.choose import choose_path, risks, slack
from ojfa_export.promises.learn_then_test import fixed_sequence, union_p_value
from ojfa_export.promises.outcomes import Costs
from ojfa_export.promises.p_values import best_stake, betting, n_log_wealth
from ojfa_export.promises.path import Path
from ojfa_export.promises.statistics import ExitStatistics


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
        certification: Touched by the tests alone. Of the exits that it has, one or more are used;
            without any, which need no windows, full depth is what is promised.
        limits: What is promised.
        costs: Of a token; they decide what is worthwhile, not what is certified.
    """
    path = None
    if certification.exits:
        windows = min(len(rows) for rows in certification.members())
        path = choose_path(
            tuning.at(certification.exits), limits, costs, slack(limits.confidence, windows)
        )
    if path is None:
        reason = (
            "full depth: on the tuning text no exits save time within the limits "
            f"({_describe(limits)})"
        )
        return _promise(None, tuning, limits, costs, [], reason)
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
        tuned = risks(path.apply(step, tuning, costs, limits.surprisal_clip), limits)
        seen = risks(path.apply(step, certification, costs, limits.surprisal_clip), limits)
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


def _promise(
    path: Path | None,
    text: ExitStatistics,
    limits: Limits,
    costs: Costs,
    certified: Sequence[Candidate],
    reason: str | None,
) -> Promise:
    members = text.members()
    outcome, policy = None, None
    if path is not None:
        outcome = path.apply(certified[-1].step, text, costs, limits.surprisal_clip)
        policy = path.policy(certified[-1].step)
    evidence = []
    for index, (name, rows) in enumerate(zip(text.domains, members, strict=True)):
        evidence.append(
            DomainEvidence(
                name=name,
                windows=len(rows),
                tokens=len(rows) * text.tokens_per_window,
                disagreement=0 if outcome is None else float(outcome.disagreement[rows].mean()),
                extra_surprisal=0
                if outcome is None
                else float(outcome.extra_surprisal[rows].mean()) * limits.surprisal_clip,
                depth=text.blocks if outcome is None else float(outcome.depth[rows].mean()),
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
        reason=reason or _kept(evidence, limits, text.blocks, relative),
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
