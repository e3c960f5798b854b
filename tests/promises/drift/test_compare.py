"""Distances by their definitions, and what a permutation test's p-value must do."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from often import assert_at_most

from ojfa_export.promises.drift.compare import (
    common_grid,
    cumulative,
    exit_shares,
    largest,
    permutation_test,
    total_variation,
)


def test_exit_shares_are_means_over_units() -> None:
    units = [np.array([4, 4, 12, 12], np.int32), np.array([8], np.int32)]
    np.testing.assert_array_equal(exit_shares(units, (4, 8, 12)), [[0.5, 0, 0.5], [0, 1, 0]])
    assert exit_shares([], (4, 12)).shape == (0, 2)


def test_distances_by_their_definitions(rng: np.random.Generator) -> None:
    first, second = rng.dirichlet(np.ones(5), 2)
    events = [list(each) for size in range(6) for each in combinations(range(5), size)]
    most = max(abs(first[each].sum() - second[each].sum()) for each in events)
    assert total_variation(first - second) == pytest.approx(most)
    a, b = (rng.normal(size=n).astype(np.float16) for n in (30, 7))
    points = np.sort(np.concatenate([a, b])).astype(np.float64)
    shares = [np.array([(x <= p).mean() for p in points]) for x in (a, b)]
    found = [cumulative([x], common_grid([a, b]))[0] for x in (a, b)]
    assert largest(found[0] - found[1]) == pytest.approx(np.abs(shares[0] - shares[1]).max())


def test_p_value_is_the_share_of_all_deals(rng: np.random.Generator) -> None:
    values = rng.normal(size=(7, 2))
    size = total_variation
    observed = size(values[:3].mean(axis=0) - values[3:].mean(axis=0))
    deals = []
    for chosen in combinations(range(7), 3):
        rest = [i for i in range(7) if i not in chosen]
        deals.append(size(values[list(chosen)].mean(axis=0) - values[rest].mean(axis=0)))
    exact = np.mean(np.array(deals) >= observed - 1e-12)
    found = permutation_test(values[:3], values[3:], size, 20_000, rng)
    assert found.distance == pytest.approx(observed)
    # Five standard errors of 20,000 draws.
    assert abs(found.p_value - exact) < 5 * (exact * (1 - exact) / 20_000) ** 0.5 + 1e-4


def test_alike_units_seldom_look_apart(rng: np.random.Generator) -> None:
    """Units whose own means differ much, as requests do; sizes of both sides differ too."""
    runs = 300
    low = 0
    for _ in range(runs):
        units = rng.beta(0.5, 2, (45, 1)) * np.array([[1, -1]])
        low += permutation_test(units[:30], units[30:], total_variation, 99, rng).p_value <= 0.05
    assert_at_most(0.05, low, runs, "alike units that look apart")


def test_units_apart_are_seen(rng: np.random.Generator) -> None:
    first, second = rng.beta(2, 8, (60, 1)), rng.beta(4, 6, (40, 1))
    assert permutation_test(first, second, largest, 999, rng).p_value == 1 / 1000
