"""The likeliest tokens of a narrow head, found among few: most can't be the likeliest of any row.

In k dimensions only tokens on the convex hull of the vocabulary's k columns ever win, and of
those the ones in the directions that rows have. The vocabulary is cut into cells of neighbours (a
k-d tree, Bentley, "Multidimensional binary search trees", 1975); a cell whose bounding box
promises less than a row has already holds nothing for that row. The result is exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.graphs.fold import FoldedHead

# Tokens of a cell at most: SmolLM2's 49,152 become 2,048 cells.
CELL = 24
# Beyond, boxes say too little: what 1,000 rows of SmolLM2 can't rule out is up to an eighth of the
# vocabulary at k = 5, half of it at 8, nearly all at 12.
WIDEST = 8


class NarrowTokens:
    """A folded head that is asked for likeliest tokens again and again.

    Args:
        head: The head.
    """

    def __init__(self, head: FoldedHead) -> None:
        self._head = head
        self._cells: _Cells | None = None

    def __call__(self, h: NDArray[Any]) -> NDArray[np.int64]:
        """The likeliest tokens [n] of hidden states h [n, H]; the lowest ids among equals."""
        head = self._head
        if head.weight.shape[1] > WIDEST or not len(h):
            return head.likeliest(h)
        if self._cells is None:
            self._cells = _Cells(head.weight, head.logit_bias)
        ids = self._cells.candidates(head.narrowed(h))
        bias = None if head.logit_bias is None else head.logit_bias[ids]
        return ids[replace(head, weight=head.weight[ids], logit_bias=bias).likeliest(h)]


class _Cells:
    """Tokens by where they are: cells of neighbours and their bounding boxes.

    Args:
        weight: [V, k].
        bias: [V], or None.
    """

    def __init__(self, weight: NDArray[Any], bias: NDArray[Any] | None) -> None:
        # A bias is one more column, of which every row has 1.
        points = weight if bias is None else np.column_stack([weight, bias])
        self._weight, self._bias = weight, bias
        self._ids = _split(points)
        cells = points[self._ids]
        low, high = cells.min(axis=1), cells.max(axis=1)
        self._boxes = np.concatenate([high, low], axis=1).T.copy()
        # Of sums of products in this arithmetic: 2 n roundings of what they are made of.
        self._rounding = 4 * (points.shape[1] + 1) * np.finfo(points.dtype).eps
        self._longest = float(np.linalg.norm(points, axis=1).max())

    def candidates(self, z: NDArray[Any]) -> NDArray[np.int64]:
        """Tokens among which the likeliest of every row [n, k] are, in order."""
        x = z if self._bias is None else np.column_stack([z, np.ones(len(z), z.dtype)])
        # No token of a cell has more than the box's best corner.
        bounds = np.concatenate([np.maximum(x, 0), np.minimum(x, 0)], axis=1) @ self._boxes
        promising = self._ids[np.unique(bounds.argmax(axis=1))].ravel()
        logits = z @ self._weight[promising].T
        if self._bias is not None:
            logits += self._bias[promising]
        reached = logits.max(axis=1)
        reached -= self._rounding * self._longest * np.linalg.norm(x, axis=1)
        # Written so that what is no number keeps its cells.
        needed = ~(bounds < reached[:, None]).all(axis=0)
        return np.unique(self._ids[needed])


def _split(points: NDArray[Any]) -> NDArray[np.int64]:
    """Cells [cells, size] of neighbours: halves along the axis that is widest, again and again.

    Where the cells would not come out even, some tokens are in two.
    """
    halvings = max(0, int(np.ceil(np.log2(len(points) / CELL))))
    size = -(-len(points) // (1 << halvings))
    ids = np.resize(np.arange(len(points)), (1, size << halvings))
    for _ in range(halvings):
        cells = points[ids]
        widest = np.ptp(cells, axis=1).argmax(axis=1)
        keys = np.take_along_axis(cells, widest[:, None, None], axis=2)[..., 0]
        order = np.argpartition(keys, keys.shape[1] // 2, axis=1)
        ids = np.take_along_axis(ids, order, axis=1).reshape(2 * len(ids), -1)
    return ids
