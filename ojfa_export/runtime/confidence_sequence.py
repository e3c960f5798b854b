"""Bounds on a mean of losses that hold at every moment of an infinite run, drift or not.

What is bounded is the average of the conditional means of n losses in [0, 1]: E[x_i | x_1..x_{i-1}]
averaged over i. It may move, and losses may depend on the past in any way.

Two families of exponential supermartingales, with S the sum of the losses and m that average, are
1 at the beginning and have a conditional mean of at most 1 after each loss:

- Bernoulli: exp(t S - n ln(1 - m + m e^t)). e^(t x) lies below its chord on [0, 1], and the
  logarithm of a Bernoulli distribution's moment generating function is concave in its mean (Howard
  et al., arXiv 1808.03204 and 1810.08240). Strong where few losses are known.
- empirical Bernstein: exp(l (S - n m) - (-ln(1 - l) - l) V) with V the sum of (x_i - g_i)^2, g_i
  any guess of x_i from the losses before (Howard et al., arXiv 1810.08240, theorem 4;
  Waudby-Smith and Ramdas, arXiv 2010.09686, theorem 2). Strong where many vary little.

A mixture of all of them is one too, and by Ville's inequality (1939) ever exceeds 1 / alpha with
probability alpha at most. The bound is the m at which it reaches that.
"""

from __future__ import annotations

import math

import numpy as np

# Small for many losses, large for few.
TILTS = np.geomspace(0.005, 8, 24)
SLOPES = np.geomspace(0.01, 0.95, 12)
SLOPE_COSTS = -np.log1p(-SLOPES) - SLOPES
_LOG_SHARE = -math.log(len(TILTS) + len(SLOPES))
_BISECTIONS = 50


class ConfidenceSequence:
    """Sums of losses, and what they say of their mean.

    Args:
        alpha: The probability that the average is ever outside the bounds, at most.
        guess: Of the first loss, 0..1: a good one narrows the bounds, any keeps them valid.

    Attributes:
        count: n.
        total: S.
        squares: V.
    """

    def __init__(self, alpha: float, guess: float) -> None:
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        self._alpha = alpha
        self._guess = guess

    def add(self, loss: float) -> None:
        """Takes one loss in [0, 1]."""
        guess = (self._guess + self.total) / (1 + self.count)
        self.count += 1
        self.total += loss
        self.squares += (loss - guess) ** 2

    @property
    def mean(self) -> float:
        """Of the losses; NaN before the first."""
        return self.total / self.count if self.count else math.nan

    def bounds(self) -> tuple[float, float]:
        """The ends, each with half of alpha."""
        n, total, alpha = self.count, self.total, self._alpha / 2
        lower = lower_bound(total, n, self.squares, alpha)
        return lower, 1 - lower_bound(n - total, n, self.squares, alpha)


def lower_bound(total: float, count: int, squares: float, alpha: float) -> float:
    """The lower end; the upper one of x is 1 minus that of 1 - x.

    Args:
        total: S.
        count: n.
        squares: V.
        alpha: 0..1, exclusive.
    """
    if count == 0 or _log_mixture(0.0, total, count, squares) <= -math.log(alpha):
        return 0.0
    low, high = 0.0, total / count
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _log_mixture(middle, total, count, squares) > -math.log(alpha):
            low = middle
        else:
            high = middle
    return low


def _log_mixture(mean: float, total: float, count: int, squares: float) -> float:
    """The logarithm of the mixture; it decreases with the mean."""
    bernoulli = TILTS * total - count * np.log1p(mean * np.expm1(TILTS))
    bernstein = SLOPES * (total - count * mean) - SLOPE_COSTS * squares
    exponents = np.concatenate([bernoulli, bernstein])
    largest = float(exponents.max())
    return largest + math.log(float(np.exp(exponents - largest).sum())) + _LOG_SHARE
