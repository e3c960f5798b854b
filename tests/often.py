"""Whether something happens no more often than it was said to."""

from __future__ import annotations

from ojfa_export.promises.p_values import binomial_tail, clopper_pearson

# Of a test that fails by luck, where the thing happens just as often as was said.
BY_LUCK = 1e-3


def assert_at_most(rate: float, count: int, runs: int, what: str) -> None:
    """An exact binomial test of "in each run, with probability `rate` at most"."""
    low, high = clopper_pearson(count, runs, 0.95)
    print(f"{what}: {count} of {runs} ({low:.3f}..{high:.3f}), said: {rate:g}")
    chance = 1 - binomial_tail(count - 1, runs, rate) if count else 1.0
    assert chance > BY_LUCK, f"{what}: {count} of {runs}, said: {rate:g}"
