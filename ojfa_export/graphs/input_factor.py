"""What GPTQ must know of the inputs of a matrix: a factor of the inverse of H = X^T X.

Of 11,008 features such a matrix takes a gigabyte in float64, and NumPy's routines want several. So
only a triangle is ever there, as panels of its rows, and what is found takes the place of what it
is found from: the inverse of a factor of H grows by one panel at a time (bordering).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.arrays import Float32

Float64 = NDArray[np.float64]
# Added to the diagonal of H, over its mean: what the paper's authors add.
DAMPING = 0.01
# Rows of a panel: products of so many run at a processor's full speed.
PANEL = 512
# Rows of X that are put in order at a time.
TOGETHER = 512


@dataclass(frozen=True)
class InputFactor:
    """What is known of the inputs of a matrix.

    U [inputs, inputs] is upper triangular, with H^-1 = U^T U of the damped H, whose rows and
    columns are in the order of rounding.

    Attributes:
        order: [inputs] int64, in which columns are rounded: largest inputs first.
        panels: `PANEL` rows of U each, float32, from their own diagonal on.
    """

    order: NDArray[np.int64]
    panels: tuple[Float32, ...]

    @classmethod
    def of(cls, inputs: Float64) -> InputFactor:
        """The factor of H = X^T X of X [rows, inputs]; features that never were count as well."""
        squares = np.einsum("ij,ij->j", inputs, inputs)
        order = np.argsort(-squares, kind="stable")
        # Backwards, as H = L L^T gives H^-1 = L^-T L^-1 with a lower triangle for an upper one.
        panels = _moments(inputs, order[::-1])
        damping = DAMPING * (float(squares.mean()) or 1.0)
        for panel in panels:
            rows = np.arange(len(panel))
            panel[rows, rows + panel.shape[1] - len(panel)] += damping
        _invert_factor(panels)
        upper = []
        while panels:  # each goes as soon as it is there in float32
            upper.append(np.ascontiguousarray(panels.pop()[::-1, ::-1], np.float32))
        return cls(order, tuple(upper))

    def rows(self, start: int, stop: int) -> Float32:
        """Rows of U that lie in one panel, from the diagonal of the first on."""
        panel, at = divmod(start, PANEL)
        return self.panels[panel][at : at + stop - start, at:]

    @property
    def diagonal(self) -> Float32:
        """Of U."""
        return np.concatenate([panel.diagonal() for panel in self.panels])


def _moments(inputs: Float64, order: NDArray[np.int64]) -> list[Float64]:
    """The lower triangle of X^T X in an order: panels of rows, each up to its own diagonal's end.

    All but the first have `PANEL` rows.
    """
    stops = range(len(order), 0, -PANEL)[::-1]
    panels = [np.zeros((min(PANEL, stop), stop)) for stop in stops]
    for at in range(0, len(inputs), TOGETHER):
        some = inputs[at : at + TOGETHER][:, order]
        for panel in panels:
            rows, stop = panel.shape
            panel += some[:, stop - rows : stop].T @ some[:, :stop]
    return panels


def _invert_factor(panels: Sequence[NDArray[Any]]) -> None:
    """Turns the lower triangle of a matrix A = L L^T into L^-1, in place.

    Where L^-1 is there down to a row, the rows below are L = A L^-T before the diagonal, by the
    Cholesky factor of what that leaves of A on it, and from both come those of L^-1.
    """
    for index, panel in enumerate(panels):
        rows, stop = panel.shape
        start = stop - rows
        before, diagonal = panel[:, :start], panel[:, start:]
        # From the last on: each column of L needs those of A that are not after it.
        for above in reversed(panels[:index]):
            size, end = above.shape
            before[:, end - size : end] = before[:, :end] @ above.T
        inverse = np.tril(np.linalg.inv(np.linalg.cholesky(diagonal - before @ before.T)))
        product = np.zeros_like(before)
        for above in panels[:index]:
            size, end = above.shape
            product[:, :end] += before[:, end - size : end] @ above
        np.matmul(-inverse, product, out=before)
        diagonal[:] = inverse
