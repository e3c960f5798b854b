"""First and second moments of paired hidden states, accumulated in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS_AT_ONCE = 1024


class Moments:
    """Means and centred second moments of rows x (a block's output) and y (the last block's).

    All that a least-squares fit of y on x needs, in 2 H^2 float64 numbers whatever the number of
    rows. Chunks are centred on their own means and merged by the pairwise update of Chan, Golub
    and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), so that large means do not cancel the small variances beside them.

    Of y alone only the per-feature sums of squares are kept: they give the loss, and the fit
    does not need more.

    Attributes:
        count: Rows seen.
        mean_x: [H] float64.
        mean_y: [H] float64.
        xx: [H, H] float64, the sum of (x - mean_x)^T (x - mean_x).
        xy: [H, H] float64, the sum of (x - mean_x)^T (y - mean_y).
        yy: [H] float64, the sum of (y - mean_y)^2.
    """

    def __init__(self, hidden_size: int) -> None:
        self.count = 0
        self.mean_x = np.zeros(hidden_size)
        self.mean_y = np.zeros(hidden_size)
        self.xx = np.zeros((hidden_size, hidden_size))
        self.xy = np.zeros((hidden_size, hidden_size))
        self.yy = np.zeros(hidden_size)

    @property
    def hidden_size(self) -> int:
        """H, the length of a row."""
        return self.mean_x.shape[0]

    def update(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Adds rows.

        Args:
            x: [n, H] hidden states after a block, any float dtype.
            y: [n, H] the last block's output for the same tokens, any float dtype.

        Raises:
            ValueError: The shapes differ from each other or from H.
        """
        if x.shape != y.shape or x.ndim != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"rows {x.shape} and {y.shape}, expected [n, {self.hidden_size}] both")
        for start in range(0, x.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self._merge(x[rows].astype(np.float64), y[rows].astype(np.float64))

    def _merge(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        added = x.shape[0]
        total = self.count + added
        mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
        x, y = x - mean_x, y - mean_y
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        weight = self.count * added / total
        self.xx += x.T @ x + weight * np.outer(step_x, step_x)
        self.xy += x.T @ y + weight * np.outer(step_x, step_y)
        self.yy += (y * y).sum(axis=0) + weight * step_y**2
        self.mean_x += step_x * (added / total)
        self.mean_y += step_y * (added / total)
        self.count = total
