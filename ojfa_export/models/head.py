"""The model's own head: the final norm and the projection onto the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.models.activation import softcapped
from ojfa_export.models.likeliest import Likeliest

_BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """The norm between the last block and the LM head.

    Attributes:
        kind: "rms" (Llama, Phi-3) or "layer" (GPT-2).
        weight: [H].
        bias: [H], or None.
        eps: Added to the mean square ("rms") or to the variance ("layer").
    """

    kind: Literal["rms", "layer"]
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    eps: float

    def apply(self, h: NDArray[Any]) -> NDArray[Any]:
        """Normalises h [..., H] in h's own dtype."""
        if self.kind == "layer":
            h = h - h.mean(axis=-1, keepdims=True)
        mean_square = np.mean(h * h, axis=-1, keepdims=True)
        y: NDArray[Any] = h / np.sqrt(mean_square + h.dtype.type(self.eps))
        y = y * self.weight.astype(h.dtype)
        return y if self.bias is None else y + self.bias.astype(h.dtype)


@dataclass(frozen=True, eq=False)
class LanguageHead:
    """The final norm and the LM head: logits = norm(h) W^T + b, or capped.

    Attributes:
        norm: The final norm.
        weight: [V, H], any float dtype, may be a memory map; converted a few rows at a time.
        bias: [V], or None.
        softcap: What keeps logits within it (`ModelSpec.logit_softcap`), or None.
    """

    norm: FinalNorm
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    softcap: float | None = None

    def logits(self, h: NDArray[Any]) -> NDArray[Any]:
        """Logits [n, V] of hidden states h [n, H], in h's dtype."""
        normed = self.norm.apply(h)
        logits = np.empty((h.shape[0], self.weight.shape[0]), h.dtype)
        for rows, weight in head_chunks(self.weight, h.dtype):
            np.matmul(normed, weight.T, out=logits[:, rows])
        if self.bias is not None:
            logits += self.bias.astype(h.dtype)
        return softcapped(logits, self.softcap)

    def likeliest(self, h: NDArray[Any]) -> NDArray[np.int64]:
        """The tokens of the largest logits [n] of hidden states h [n, H]; the lowest of equals.

        A softcap is left out: it changes no order.
        """
        normed, found = self.norm.apply(h), Likeliest(len(h))
        for rows, weight in head_chunks(self.weight, h.dtype):
            bias = None if self.bias is None else self.bias[rows].astype(h.dtype)
            found.see(normed, weight, bias, rows.start)
        return found.tokens


def head_chunks(weight: NDArray[Any], dtype: np.dtype[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Slices of rows of an LM head [V, H], and those rows in `dtype`, at most 64 MB at a time.

    Rows that are of this dtype already are not copied.
    """
    vocabulary, hidden = weight.shape
    rows = max(1, _BYTES_AT_ONCE // (hidden * dtype.itemsize))
    for start in range(0, vocabulary, rows):
        part = slice(start, min(start + rows, vocabulary))
        yield part, weight[part].astype(dtype, copy=False)
