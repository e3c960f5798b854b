"""P-values for "the mean loss is above the limit": valid for any distribution of losses in [0, 1].

Each is super-uniform under that hypothesis when the losses are independent draws of one
distribution: P(p <= u) <= u for every u. A small one is evidence that the limit is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the largest stake that can't go bankrupt: a window that differs everywhere then costs a factor
# of ten and not everything, while faultless ones need only a tenth more windows.
STAKE_SHARE = 0.9
_STAKES = 33


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(Bin(trials, probability) <= successes), exact but for rounding.

    Raises:
        ValueError: Out of range.
    """
    if not (0 <= successes <= trials and 0 < probability < 1):
        raise ValueError(f"no binomial tail of {successes} in {trials} at {probability}")
    if successes == trials:
        return 1.0
    i = np.arange(1, successes + 1, dtype=np.float64)
    steps = np.log((trials - i + 1) / i) + math.log(probability) - math.log1p(-probability)
    log_terms = trials * math.log1p(-probability) + np.concatenate([[0.0], np.cumsum(steps)])
    largest = float(log_terms.max())
    return min(1.0, math.exp(largest) * float(np.exp(log_terms - largest).sum()))


def clopper_pearson(failures: int, trials: int, confidence: float) -> tuple[float, float]:
    """The exact two-sided confidence interval of a share (Clopper and Pearson, 1934)."""
    tail = (1 - confidence) / 2
    lower, upper = 0.0, 1.0
    if failures > 0:  # P(X >= failures) = tail
        lower = _root(lambda p: 1 - binomial_tail(failures - 1, trials, p) - tail)
    if failures < trials:  # P(X <= failures) = tail
        upper = _root(lambda p: tail - binomial_tail(failures, trials, p))
    return lower, upper


def hoeffding_bentkus(losses: NDArray[Any], limit: float) -> float:
    """The p-value of Learn-then-Test (arXiv 2110.01052, section 3.1, after arXiv 2101.02703).

    min(exp(-n h(min(r, limit), limit)), e P(Bin(n, limit) <= ceil(n r))), where r is the mean of
    the n losses and h(a, b) = a ln(a/b) + (1-a) ln((1-a)/(1-b)).

    Args:
        losses: [n] in [0, 1], n >= 1.
        limit: 0..1, exclusive.
    """
    n = losses.size
    # Rounding must not lift a sum that is a whole number above it.
    total = float(np.sum(losses, dtype=np.float64)) * (1 - 1e-12)
    mean = total / n
    hoeffding = math.exp(-n * _divergence(min(mean, limit), limit))
    bentkus = math.e * binomial_tail(min(n, math.ceil(total)), n, limit)
    return min(1.0, hoeffding, bentkus)


def betting(losses: NDArray[Any], limit: float, stake: float) -> float:
    """One over the wealth of a bet that the mean loss is below the limit (arXiv 2010.09686).

    Wealth prod(1 + stake (limit - loss)) starts at 1 and has a mean of at most 1 where the mean
    loss is at least the limit, so that by Markov's inequality its inverse is a p-value. It uses
    that losses of windows vary little, which Hoeffding-Bentkus can't, and neither the order of the
    losses nor the number of tokens behind each matters.

    Args:
        losses: [n] in [0, 1].
        limit: 0..1, exclusive.
        stake: 0..`largest_stake(limit)`, chosen without looking at `losses`: see `best_stake`.
    """
    return math.exp(-max(0.0, n_log_wealth(losses, limit, stake)))


def n_log_wealth(losses: NDArray[Any], limit: float, stake: float) -> float:
    """The logarithm of the wealth of `betting`, summed over the losses."""
    return float(np.log1p(stake * (limit - losses.astype(np.float64))).sum())


def largest_stake(limit: float) -> float:
    """The largest stake that `best_stake` gives."""
    return STAKE_SHARE / (1 - limit)


def best_stake(losses: NDArray[Any], limit: float) -> float:
    """The stake whose wealth grows fastest on these losses, to be used on others; 0 if none does.

    Args:
        losses: [n] in [0, 1], of the tuning split.
        limit: 0..1, exclusive.
    """
    stakes = np.linspace(0, largest_stake(limit), _STAKES)
    gains = limit - losses.astype(np.float64)
    growth = np.log1p(stakes[:, None] * gains).sum(axis=1)
    return float(stakes[int(growth.argmax())])


def windows_needed(limit: float, confidence: float) -> int:
    """The fewest windows that can show a promise: where not one token differs."""
    growth = math.log1p(largest_stake(limit) * limit)
    return math.ceil(-math.log1p(-confidence) / growth)


def _divergence(a: float, b: float) -> float:
    """Of Bernoulli(b) from Bernoulli(a)."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


def _root(increasing: Callable[[float], float]) -> float:
    """Where an increasing function of a probability is 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if increasing(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
