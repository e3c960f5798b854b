"""Exit policies, and the path of them that one number leads along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.measures import MEASURES
from ojfa_export.promises.statistics import ExitStatistics

Float64 = NDArray[np.float64]

# The path: the share of tokens that may differ, as each exit estimates it, at which it lets go.
# Fixed in advance, and fine: fixed-sequence testing pays nothing for many candidates.
EAGERNESS: Float64 = np.geomspace(1e-4, 0.9, 160)


@dataclass(frozen=True)
class Costs:
    """What a token costs, in any one unit.

    Attributes:
        depths: [L] of its first 1..L blocks, with all that it costs beside blocks and heads.
        checks: Of asking one exit, head and confidence, by the measure of confidence.
        final: Of the model's own head.
        leaving: Of a token that leaves at an exit, beside its check: the exit head, where a check
            head was asked instead.
        catch_up: What a block costs more when it runs any tokens that waited beside the newest.
        waiting: What each of them adds to that.
    """

    depths: tuple[float, ...]
    checks: Mapping[Measure, float]
    final: float
    catch_up: float = 0.0
    waiting: float = 0.0
    leaving: float = 0.0

    @classmethod
    def even(cls, blocks: int, block: float, check: float, final: float) -> Costs:
        """Of equal blocks, where catching up is free."""
        depths = tuple(block * depth for depth in range(1, blocks + 1))
        return cls(depths, dict.fromkeys(MEASURES, check), final)

    @property
    def full(self) -> float:
        """Of full depth without an exit that is asked."""
        return self.depths[-1] + self.final

    def catching_up(self, reach: Float64, neighbours: Float64) -> Float64:
        """What waiting tokens add to one block, per token of the text.

        Every token that waits runs in the end, beside the next that comes so deep by itself.

        Args:
            reach: Shares of the tokens that come to the block by themselves.
            neighbours: Shares that do so right after another that did: for them nothing waits.
        """
        late = np.where(reach > 0, 1 - reach, 0)
        return self.catch_up * np.maximum(reach - neighbours, 0) + self.waiting * late


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy does to text. Arrays [W], means over each window's tokens.

    Attributes:
        disagreement: Share of tokens that differ from the full model's choice.
        extra_surprisal: In nats, clipped as the limits say and divided by the clip: 0..1.
        cost: Of a token.
        depth: Blocks run.
    """

    disagreement: Float64
    extra_surprisal: Float64
    cost: Float64
    depth: Float64


def apply(
    statistics: ExitStatistics, policy: ExitPolicy, costs: Costs, surprisal_clip: float
) -> Outcome:
    """What a policy does to the statistics' tokens.

    Raises:
        ValueError: The statistics lack one of the policy's exits.
    """
    columns = [statistics.exits.index(depth) for depth in policy.exits]
    thresholds = np.array(policy.thresholds)
    return _apply(statistics, policy.measure, columns, thresholds, costs, surprisal_clip)


def depths_of(statistics: ExitStatistics, policy: ExitPolicy) -> NDArray[np.int32]:
    """Blocks that each of the statistics' tokens runs under a policy, [W, m].

    Raises:
        ValueError: The statistics lack one of the policy's exits.
    """
    depths = np.full(statistics.agrees.shape[:2], statistics.blocks, np.int32)
    thresholds = np.array(policy.thresholds)  # as float64: half of their digits would round
    for exit, threshold in reversed(list(zip(policy.exits, thresholds, strict=True))):
        sure = statistics.of(policy.measure)[..., statistics.exits.index(exit)]
        depths[sure >= threshold] = exit
    return depths


def _apply(
    statistics: ExitStatistics,
    measure: Measure,
    columns: list[int],
    thresholds: Float64,
    costs: Costs,
    clip: float,
) -> Outcome:
    windows, tokens, _ = statistics.agrees.shape
    remaining = np.ones((windows, tokens), np.bool_)
    differs = np.zeros(windows)
    surprisal = np.zeros(windows)
    cost = np.zeros(windows)
    depth = np.zeros(windows)
    confidence = statistics.of(measure)
    asked = [i for i, threshold in enumerate(thresholds) if np.isfinite(threshold)]
    ends = [*(statistics.exits[columns[i]] for i in asked), statistics.blocks]
    for i, next_depth in zip(asked, ends[1:], strict=True):
        column, here = columns[i], statistics.exits[columns[i]]
        cost += costs.checks[measure] * remaining.sum(axis=1)
        leaves = remaining & (confidence[..., column] >= thresholds[i])
        remaining &= ~leaves
        left = leaves.sum(axis=1)
        differs += (leaves & ~statistics.agrees[..., column]).sum(axis=1)
        extra = np.minimum(statistics.extra_surprisal[..., column].astype(np.float64), clip)
        surprisal += (extra * leaves).sum(axis=1)
        cost += (costs.depths[here - 1] + costs.leaving) * left
        depth += here * left
        late = costs.catching_up(remaining.mean(axis=1), statistics.neighbours(remaining))
        cost += (next_depth - here) * late * tokens
    stayed = remaining.sum(axis=1)
    cost += costs.full * stayed
    depth += statistics.blocks * stayed
    return Outcome(differs / tokens, surprisal / (tokens * clip), cost / tokens, depth / tokens)


@dataclass(frozen=True, eq=False)
class Path:
    """Candidate policies from full depth to the most eager: one for each value of EAGERNESS.

    Every exit's threshold is the least confidence at which its tokens agree with the full model
    with probability 1 - eagerness or more, as isotonic regression on the tuning split has it. More
    eagerness lowers every threshold, so no token leaves later than before.

    Attributes:
        measure: Of confidence.
        exits: [E] blocks run.
        thresholds: [len(EAGERNESS), E]; infinite where the exit is not taken.
    """

    measure: Measure
    exits: tuple[int, ...]
    thresholds: Float64

    def policy(self, step: int) -> ExitPolicy | None:
        """The candidate at a step of the path; None is full depth."""
        taken = np.flatnonzero(np.isfinite(self.thresholds[step]))
        if not len(taken):
            return None
        return ExitPolicy(
            exits=tuple(self.exits[i] for i in taken),
            measure=self.measure,
            thresholds=tuple(float(self.thresholds[step, i]) for i in taken),
        )

    def only(self, exits: tuple[int, ...]) -> Path:
        """The path that uses some of the exits."""
        columns = [self.exits.index(depth) for depth in exits]
        return Path(self.measure, exits, self.thresholds[:, columns])

    def apply(
        self, step: int, statistics: ExitStatistics, costs: Costs, surprisal_clip: float
    ) -> Outcome:
        """What the candidate at a step does to the statistics' tokens."""
        columns = [statistics.exits.index(depth) for depth in self.exits]
        return _apply(
            statistics, self.measure, columns, self.thresholds[step], costs, surprisal_clip
        )


def paths(tuning: ExitStatistics) -> list[Path]:
    """For each measure, the path that uses every exit."""
    return [_path(tuning, measure) for measure in MEASURES]


def _path(tuning: ExitStatistics, measure: Measure) -> Path:
    exits = len(tuning.exits)
    thresholds = np.full((EAGERNESS.size, exits), np.inf)
    for column in range(exits):
        confidence = tuning.of(measure)[..., column].astype(np.float64).ravel()
        steps, agreement = isotonic(confidence, tuning.agrees[..., column].ravel())
        first = np.searchsorted(agreement, 1 - EAGERNESS)  # agreement increases with confidence
        reached = first < agreement.size
        thresholds[reached, column] = steps[first[reached]]
    return Path(measure, tuning.exits, thresholds)


def isotonic(confidence: Float64, agrees: NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """The increasing step function of confidence nearest to `agrees` in least squares.

    Pool-adjacent-violators (Ayer et al., 1955).

    Args:
        confidence: [n], n >= 1.
        agrees: [n].

    Returns:
        The confidence at which each step begins, and the share that agrees there; both increase.
    """
    starts, inverse = np.unique(confidence, return_inverse=True)
    sizes = np.bincount(inverse)
    hits = np.bincount(inverse, weights=agrees)
    pooled: list[tuple[float, float, float]] = []  # start, hits, size
    for start, hit, size in zip(starts.tolist(), hits.tolist(), sizes.tolist(), strict=True):
        while pooled and pooled[-1][1] * size >= hit * pooled[-1][2]:
            start, more_hits, more = pooled.pop()
            hit, size = hit + more_hits, size + more
        pooled.append((start, hit, size))
    steps = np.array(pooled)
    return steps[:, 0], steps[:, 1] / steps[:, 2]
