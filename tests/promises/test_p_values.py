"""P-values against exact arithmetic, and what every p-value must do."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from often import assert_at_most
from tolerances import P_VALUE_RELATIVE

from ojfa_export.promises.learn_then_test import fixed_sequence, union_p_value
from ojfa_export.promises.p_values import (
    best_stake,
    betting,
    binomial_tail,
    clopper_pearson,
    hoeffding_bentkus,
    largest_stake,
    windows_needed,
)

SHARES = st.floats(0, 1)
LOSSES = st.lists(SHARES, min_size=1, max_size=60).map(np.array)
LIMITS = st.floats(0.01, 0.6)


def exact_tail(successes: int, trials: int, probability: float) -> float:
    p = Fraction(probability)
    terms = (math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(successes + 1))
    return float(sum(terms, Fraction(0)))


@given(st.integers(1, 60), st.data(), st.floats(0.001, 0.999))
def test_binomial_tail_is_exact(trials: int, data: st.DataObject, probability: float) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = exact_tail(successes, trials, probability)
    found = binomial_tail(successes, trials, probability)
    assert found == pytest.approx(expected, rel=P_VALUE_RELATIVE)


@pytest.mark.parametrize(("k", "n", "p"), [(400, 10_000, 0.05), (52, 1000, 0.05), (0, 5000, 1e-3)])
def test_binomial_tail_of_many(k: int, n: int, p: float) -> None:
    with mpmath.workdps(40):
        q = mpmath.mpf(p)
        expected = mpmath.fsum(math.comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k + 1))
    assert binomial_tail(k, n, p) == pytest.approx(float(expected), rel=P_VALUE_RELATIVE)


@pytest.mark.parametrize(("k", "n", "p"), [(-1, 3, 0.5), (4, 3, 0.5), (1, 3, 0), (1, 3, 1)])
def test_no_binomial(k: int, n: int, p: float) -> None:
    with pytest.raises(ValueError, match="no binomial tail"):
        binomial_tail(k, n, p)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (7, 300)])
def test_clopper_pearson_ends_leave_half_of_the_rest_each(k: int, n: int) -> None:
    lower, upper = clopper_pearson(k, n, 0.95)
    assert lower < k / n or lower == k == 0
    assert upper > k / n or upper == k / n == 1
    if k:
        assert 1 - exact_tail(k - 1, n, lower) == pytest.approx(0.025)
    if k < n:
        assert exact_tail(k, n, upper) == pytest.approx(0.025)


@given(LOSSES, LIMITS)
def test_hoeffding_bentkus_by_its_formula(losses: np.ndarray, limit: float) -> None:
    n, mean = len(losses), mpmath.fsum(losses.tolist()) / len(losses)
    a, b = min(mean, mpmath.mpf(limit)), mpmath.mpf(limit)
    divergence = (a * mpmath.log(a / b) if a else 0) + (
        (1 - a) * mpmath.log((1 - a) / (1 - b)) if a < 1 else 0
    )
    count = min(n, math.ceil(mpmath.fsum(losses.tolist()) * (1 - mpmath.mpf(10) ** -12)))
    bentkus = mpmath.e * exact_tail(count, n, limit)
    expected = min(1, mpmath.exp(-n * divergence), bentkus)
    assert hoeffding_bentkus(losses, limit) == pytest.approx(float(expected), rel=1e-9)


def test_hoeffding_bentkus_of_whole_losses_counts_them() -> None:
    losses = np.zeros(200)
    losses[:3] = 1
    hoeffding = 200 * (0.015 * math.log(0.015 / 0.05) + 0.985 * math.log(0.985 / 0.95))
    expected = min(math.exp(-hoeffding), math.e * exact_tail(3, 200, 0.05))
    assert hoeffding_bentkus(losses, 0.05) == pytest.approx(expected)


@given(LOSSES, LIMITS, st.integers(0, 59), SHARES, SHARES)
def test_smaller_losses_give_smaller_p_values(
    losses: np.ndarray, limit: float, index: int, share: float, stake: float
) -> None:
    smaller = losses.copy()
    smaller[index % len(losses)] *= share
    stake *= largest_stake(limit)
    assert betting(smaller, limit, stake) <= betting(losses, limit, stake) * (1 + 1e-12)
    assert hoeffding_bentkus(smaller, limit) <= hoeffding_bentkus(losses, limit) * (1 + 1e-9)


@given(LOSSES, LIMITS)
def test_larger_limits_give_smaller_hoeffding_bentkus(losses: np.ndarray, limit: float) -> None:
    larger = hoeffding_bentkus(losses, 1.2 * limit)
    assert larger <= hoeffding_bentkus(losses, limit) * (1 + 1e-9)


@given(LOSSES, LIMITS, st.integers(1, 20), SHARES)
def test_faultless_windows_only_help(
    losses: np.ndarray, limit: float, more: int, stake: float
) -> None:
    longer = np.concatenate([losses, np.zeros(more)])
    stake *= largest_stake(limit)
    assert betting(longer, limit, stake) <= betting(losses, limit, stake) * (1 + 1e-12)


@given(LOSSES, LIMITS, st.randoms(use_true_random=False))
def test_order_does_not_matter(losses: np.ndarray, limit: float, random: object) -> None:
    shuffled = losses.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    stake = best_stake(losses, limit)
    assert 0 <= stake <= largest_stake(limit)
    assert betting(np.array(shuffled), limit, stake) == pytest.approx(betting(losses, limit, stake))


@given(LOSSES, LIMITS)
def test_best_stake_bets_only_on_what_grows(losses: np.ndarray, limit: float) -> None:
    if losses.mean() >= limit:
        assert best_stake(losses, limit) == 0
    assert betting(losses, limit, best_stake(losses, limit)) <= 1


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.9), (0.5, 9.5), (2.0, 38.0)])
def test_p_values_are_valid_at_the_limit(
    rng: np.random.Generator, alpha: float, beta: float
) -> None:
    """Losses whose mean is the limit, 5%: P(p <= u) <= u."""
    draws, limit = 4000, 0.05
    losses = rng.beta(alpha, beta, (draws, 150))
    stakes = np.linspace(0.1, 1, 7) * largest_stake(limit)
    tests = [lambda row: hoeffding_bentkus(row, limit)]
    tests += [lambda row, stake=stake: betting(row, limit, stake) for stake in stakes]
    for test in tests:
        found = np.array([test(row) for row in losses])
        for level in (0.01, 0.05, 0.2):
            assert_at_most(level, int((found <= level).sum()), draws, f"p <= {level}")


@given(st.floats(0.005, 0.5), st.floats(0.5, 0.999))
def test_windows_needed(limit: float, confidence: float) -> None:
    needed = windows_needed(limit, confidence)
    stake = largest_stake(limit)
    assert betting(np.zeros(needed), limit, stake) <= (1 - confidence) * (1 + 1e-9)
    assert needed == 1 or betting(np.zeros(needed - 1), limit, stake) > 1 - confidence
    # No valid test needs fewer than a binomial one without a failure.
    assert needed >= math.log(1 - confidence) / math.log(1 - limit) - 1e-9


@given(st.lists(SHARES, max_size=20), st.floats(0.5, 0.99))
def test_fixed_sequence_stops_at_the_first_that_fails(
    values: list[float], confidence: float
) -> None:
    count = fixed_sequence(iter(values), confidence)
    assert all(value <= 1 - confidence for value in values[:count])
    assert count == len(values) or values[count] > 1 - confidence


@given(st.lists(SHARES, min_size=1, max_size=5), SHARES)
def test_another_domain_never_helps(values: list[float], another: float) -> None:
    assert union_p_value([*values, another]) >= union_p_value(values)


def test_fixed_sequence_keeps_its_level(rng: np.random.Generator) -> None:
    """Two hundred true nulls, independent: the chance to accept any of them is still 5%."""
    draws = 4000
    wrong = sum(fixed_sequence(iter(rng.random(200)), 0.95) > 0 for _ in range(draws))
    assert_at_most(0.05, wrong, draws, "true nulls accepted")
