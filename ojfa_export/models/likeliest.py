"""The likeliest token of each row, of a product with a vocabulary that is never held whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rows and tokens of the vocabulary at a time: products as fast as with all, and their results are
# looked at while a core's caches hold them.
ROWS, TOKENS = 1024, 4096


class Likeliest:
    """The largest logit of each row among those seen so far; the lowest id among equals.

    Args:
        rows: How many rows.

    Attributes:
        tokens: [rows] ids; 0 where nothing above -infinity was seen.
    """

    def __init__(self, rows: int) -> None:
        self.tokens = np.zeros(rows, np.int64)
        self._logits = np.full(rows, -np.inf)

    def see(
        self, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, first: int = 0
    ) -> None:
        """Looks at some more tokens: logits x weight^T + bias.

        Args:
            x: [rows, k].
            weight: [n, k].
            bias: [n], or None.
            first: The id of the first of them, above those seen before.
        """
        for start in range(0, len(x), ROWS):
            rows = slice(start, min(start + ROWS, len(x)))
            for at in range(0, len(weight), TOKENS):
                part = slice(at, at + TOKENS)
                logits = x[rows] @ weight[part].T
                if bias is not None:
                    logits += bias[part]
                self._take(rows, logits, first + at)

    def _take(self, rows: slice, logits: NDArray[Any], first: int) -> None:
        chosen = logits.argmax(axis=1)
        values = np.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
        better = values > self._logits[rows]
        self._logits[rows][better] = values[better]
        self.tokens[rows][better] = first + chosen[better]
