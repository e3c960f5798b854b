"""What an exit policy does to text: tokens that differ, and what they cost."""

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
    return apply_thresholds(statistics, policy.measure, columns, thresholds, costs, surprisal_clip)


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


def apply_thresholds(
    statistics: ExitStatistics,
    measure: Measure,
    columns: list[int],
    thresholds: Float64,
    costs: Costs,
    clip: float,
) -> Outcome:
    """As `apply`, of some of the statistics' exits; an infinite threshold leaves its exit out."""
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
