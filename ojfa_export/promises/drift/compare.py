"""How far apart two sets of units are, and how often luck alone would set them so far apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
# Values at which distributions of confidence are compared.
GRID = 41
# Permutations that are in memory at a time.
_AT_ONCE = 256


@dataclass(frozen=True)
class Distance:
    """Between calibration and log.

    Attributes:
        distance: 0 to 1: total variation of shares, or the largest difference of two cumulative
            distributions (Kolmogorov and Smirnov's).
        p_value: How often units dealt out at random are as far apart, or further.
    """

    distance: float
    p_value: float


def total_variation(difference: Float64) -> Float64:
    """Half of the absolute differences' sum over the last axis."""
    half: Float64 = np.abs(difference).sum(axis=-1) / 2
    return half


def largest(difference: Float64) -> Float64:
    """The largest absolute difference over the last axis."""
    most: Float64 = np.abs(difference).max(axis=-1)
    return most


def exit_shares(blocks_run: Sequence[NDArray[np.int32]], depths: Sequence[int]) -> Float64:
    """[units, depths] the share of each unit's tokens at each depth."""
    shares = [[(run == depth).mean() for depth in depths] for run in blocks_run]
    return np.array(shares, np.float64).reshape(len(blocks_run), len(depths))


def cumulative(values: Sequence[NDArray[np.float16]], grid: Float64) -> Float64:
    """[units, grid] the share of each unit's values at or below each point."""
    below = [np.searchsorted(np.sort(each), grid, side="right") / len(each) for each in values]
    return np.array(below, np.float64).reshape(len(values), len(grid))


def common_grid(values: Sequence[NDArray[np.float16]]) -> Float64:
    """Points at equal shares of all values together, the least and the largest among them."""
    together = np.concatenate(values).astype(np.float64)
    points: Float64 = np.unique(np.quantile(together, np.linspace(0, 1, GRID), method="nearest"))
    return points


def permutation_test(
    first: Float64,
    second: Float64,
    size: Callable[[Float64], Float64],
    permutations: int,
    rng: np.random.Generator,
) -> Distance:
    """Compares the means of two sets of units, without an assumption on their distribution.

    Where both sets are draws of one population, every way to deal the units out is equally likely,
    and P(p_value <= u) <= u (Phipson and Smyth, 2010, arXiv 1603.05766: the observed one counts).

    Args:
        first: [n, d], a row for each unit.
        second: [m, d].
        size: Of differences [..., d]: [...].
        permutations: How many ways are drawn; the least p-value is 1 / (permutations + 1).
        rng: Draws them.
    """
    together = np.concatenate([first, second])
    total, count = together.sum(axis=0), len(first)
    observed = float(size(first.mean(axis=0) - second.mean(axis=0)))
    reached = 1
    for start in range(0, permutations, _AT_ONCE):
        draws = min(_AT_ONCE, permutations - start)
        sums = _deal(rng, draws, len(together), count) @ together
        differences = sums / count - (total - sums) / len(second)
        # Rounding must not make a repetition of the observed one smaller.
        reached += int((size(differences) >= observed - 1e-12).sum())
    return Distance(observed, reached / (permutations + 1))


def _deal(rng: np.random.Generator, draws: int, units: int, count: int) -> Float64:
    """[draws, units] 1 where a unit is one of the `count` that were dealt out, else 0."""
    # Those with the least of independent numbers: every set is equally likely.
    order = rng.random((draws, units)).argpartition(count - 1, axis=1)
    dealt = np.zeros((draws, units))
    np.put_along_axis(dealt, order[:, :count], 1.0, axis=1)
    return dealt
