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
        # Taken once: fresh memory for every chunk costs as much as the products.
        centred = np.empty((2, min(len(x), _ROWS_AT_ONCE) + 1, self.hidden_size))
        for start in range(0, len(x), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self._merge(x[rows], y[rows], centred)

    def _merge(self, x: NDArray[Any], y: NDArray[Any], memory: NDArray[np.float64]) -> None:
        added, total = len(x), self.count + len(x)
        mean_x, mean_y = (rows.mean(axis=0, dtype=np.float64) for rows in (x, y))
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        # How far the means are apart enters like one more row.
        weight = np.sqrt(self.count * added / total)
        x = _centred(memory[0, : added + 1], x, mean_x, weight * step_x)
        y = _centred(memory[1, : added + 1], y, mean_y, weight * step_y)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += np.einsum("ij,ij->j", y, y)
        self.mean_x += step_x * (added / total)
        self.mean_y += step_y * (added / total)
        self.count = total


def _centred(
    out: NDArray[np.float64],
    rows: NDArray[Any],
    mean: NDArray[np.float64],
    last: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`out` [n + 1, H], with the rows less their mean, and one more."""
    np.subtract(rows, mean, out=out[:-1])
    out[-1] = last
    return out
