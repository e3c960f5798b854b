"""Ways of decoding, run as they would run: at the depths of the text, on made-up tokens.

What waits where, which kernels that calls for, and what a policy or a draft does beside it, is
then timed and not added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import MAX_DRAFT
from ojfa_export.planning.drafting import round_of
from ojfa_export.planning.frontier import Point
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.planning.turns import FEWEST_ROUNDS, Step, Turns
from ojfa_export.promises.outcomes import apply, depths_of
from ojfa_export.promises.statistics import ExitStatistics
from ojfa_export.system.progress import Progress

# Tokens that a turn may add to the cache at once: drafts and the one after them.
ROOM = MAX_DRAFT + 2
# Tokens that a policy decides in a turn, at most; rounds of drafts; steps of full depth.
TOKENS, DRAFTS, FULL = 192, 24, 24
# Exits of which the best draft is rehearsed.
DRAFTING_EXITS = 3
ROUNDS = 8


def rehearse(
    points: Sequence[Point],
    statistics: ExitStatistics,
    costs: StepCosts,
    turns: Turns,
    seconds: float,
    progress: Progress,
) -> list[Point]:
    """The points, with times that were measured.

    Fixed exits and full depth are measured already. Of drafts the best length at the three best
    exits is timed, and what the others are expected to take is corrected by as much as theirs.
    Full depth takes turns with them, and all are scaled so that it takes what it did when it was
    measured: a machine that others use is not as fast at all times.

    Args:
        points: Expected.
        statistics: That the points are of.
        costs: That they were expected from.
        turns: Where to time them.
        seconds: No new round is begun after so many, but for the first three.
        progress: Shows rounds.
    """
    drafts = _best_drafts(points)
    asked = [p for p in points if p.policy is not None or p in drafts]
    if not asked:
        return list(points)
    full = next(point for point in points if point.kind == "full")
    found = time_points([full, *asked], statistics, costs, turns, seconds, progress)
    scale = full.ms / found.pop(full).ms
    found = {point: replace(timed, ms=timed.ms * scale) for point, timed in found.items()}
    ratios = [found[point].ms / point.ms for point in drafts]
    correction = float(np.median(ratios)) if ratios else 1.0
    others = [p for p in _at_exits(points) if p not in drafts]
    found |= {point: replace(point, ms=point.ms * correction) for point in others}
    return [found.get(point, point) for point in points]


def time_points(
    points: Sequence[Point],
    statistics: ExitStatistics,
    costs: StepCosts,
    turns: Turns,
    seconds: float,
    progress: Progress,
) -> dict[Point, Point]:
    """Policies, drafts and full depth with measured times; see `rehearse`."""
    if not points:
        return {}
    expected = sum(p.ms for p in points if p.policy is not None) / 1e3
    affordable = TOKENS if not expected else int(seconds / FEWEST_ROUNDS / expected)
    sample = _sample(statistics, min(TOKENS, affordable))
    scripts = {point: _script(point, sample, turns) for point in points}
    times = turns.time(scripts, ROUNDS, seconds, "rehearsing", progress)
    result = {}
    for point, milliseconds in times.items():
        if point.policy is not None:
            taken = float(milliseconds.sum()) / (sample.windows * sample.tokens_per_window)
            # These few tokens may leave earlier or later than all do: as much as is expected.
            few = apply(sample, point.policy, costs.of_policies(), surprisal_clip=1.0)
            taken *= point.ms / float(few.cost.mean())
        elif point.kind == "full":
            taken = float(milliseconds.sum()) / FULL
        else:
            assert point.draft is not None
            taken = float(milliseconds.mean())
            taken *= point.blocks / ((point.draft + 1) * statistics.blocks)  # per token it gives
        result[point] = replace(point, ms=taken)
    return result


def _best_drafts(points: Sequence[Point]) -> list[Point]:
    fastest: dict[int | None, Point] = {}
    for point in sorted(_at_exits(points), key=lambda p: p.ms):
        fastest.setdefault(point.exit, point)
    return list(fastest.values())[:DRAFTING_EXITS]


def _at_exits(points: Sequence[Point]) -> list[Point]:
    """Drafts at exits; those of the draft layer were timed as they run already."""
    return [point for point in points if point.kind == "speculation" and point.exit]


def _sample(statistics: ExitStatistics, tokens: int) -> ExitStatistics:
    """So many tokens of some windows, a run at least."""
    each = statistics.tokens_per_window
    windows = np.linspace(0, statistics.windows - 1, max(1, tokens // each)).astype(int)
    kept = min(each, max(1, tokens // statistics.run) * statistics.run)
    some = statistics.select(np.unique(windows))
    return replace(
        some,
        confidence=some.confidence[:, :, :kept],
        agrees=some.agrees[:, :kept],
        extra_surprisal=some.extra_surprisal[:, :kept],
    )


def _script(point: Point, sample: ExitStatistics, turns: Turns) -> list[Step]:
    if point.policy is not None:
        return _deciding(point.policy, depths_of(sample, point.policy), turns)
    if point.kind == "full":
        return turns.steps(["full"] * FULL)
    assert point.exit is not None
    assert point.draft is not None
    return [round_of(turns, point.exit, point.draft)] * DRAFTS


def _deciding(policy: ExitPolicy, depths: NDArray[np.int32], turns: Turns) -> list[Step]:
    """Steps of a policy that stop at given depths, [W, m], whatever the exits say."""

    def stopping(depth: int) -> ExitPolicy:
        thresholds = tuple(2.0 if exit < depth else -1e9 for exit in policy.exits)
        return policy.model_copy(update={"thresholds": thresholds})

    forced = {depth: stopping(depth) for depth in np.unique(depths).tolist()}
    return turns.steps([forced[depth] for depth in depths.ravel().tolist()])
