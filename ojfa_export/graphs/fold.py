"""Folds a narrow jump, the final norm and the LM head into one small head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import ExitShortcut
from ojfa_export.models.head import FinalNorm, LanguageHead, head_chunks
from ojfa_export.models.likeliest import Likeliest


@dataclass(frozen=True, eq=False)
class FoldedHead:
    """The exit head: z = h project + bias; logits = z / rms(z) weight^T + logit_bias.

    rms(z) is sqrt(mean(z^2) + eps), with the final norm's eps, over the k entries of z. A model's
    softcap of logits comes after it (`graphs.heads`).

    Attributes:
        project: [H, k].
        bias: [k].
        eps: The final norm's.
        weight: [V, k].
        logit_bias: [V], or None where the norm and the LM head have no bias.
    """

    project: NDArray[np.floating]
    bias: NDArray[np.floating]
    eps: float
    weight: NDArray[np.floating]
    logit_bias: NDArray[np.floating] | None

    def logits(self, h: NDArray[Any]) -> NDArray[Any]:
        """Logits [n, V] of hidden states h [n, H], in the head's dtype."""
        logits: NDArray[Any] = self.narrowed(h) @ self.weight.T
        if self.logit_bias is not None:
            logits += self.logit_bias
        return logits

    def likeliest(self, h: NDArray[Any]) -> NDArray[np.int64]:
        """The tokens of the largest logits [n] of hidden states h [n, H]; the lowest of equals."""
        found = Likeliest(len(h))
        found.see(self.narrowed(h), self.weight, self.logit_bias)
        return found.tokens

    def narrowed(self, h: NDArray[Any]) -> NDArray[Any]:
        """What the weight is multiplied with, z / rms(z): [n, k] of h [n, H]."""
        dtype = self.project.dtype
        z = h.astype(dtype) @ self.project + self.bias
        mean_square = np.mean(z * z, axis=-1, keepdims=True)
        result: NDArray[Any] = z / np.sqrt(mean_square + dtype.type(self.eps))
        return result


def fold_if_narrow(shortcut: ExitShortcut, head: LanguageHead) -> FoldedHead | ExitShortcut:
    """What an exit head is made of: a narrow jump folded, another jump as it is."""
    if isinstance(shortcut, Shortcut) and not shortcut.residual:
        return fold(shortcut, head.norm, head.weight, head.bias)
    return shortcut


def fold(
    shortcut: Shortcut,
    norm: FinalNorm,
    head_weight: NDArray[Any],
    head_bias: NDArray[Any] | None,
    *,
    dtype: DTypeLike = np.float32,
) -> FoldedHead:
    """Folds y = ((h s + t) D) U, the final norm and the LM head W into a head of width k = r.

    The norm sees y only through its r coordinates: with U^T = Q R (QR decomposition; for
    LayerNorm each row of U less its mean), ||y|| = ||R z|| for z = (h s + t) D. So the norm over H
    is a norm over k entries of z R^T sqrt(k / H), and W needs only its k columns
    W diag(g) Q sqrt(H / k). Exact but for rounding; computed in float64.

    Args:
        shortcut: Without residual: y = h + ... does not pass through r coordinates.
        norm: The final norm.
        head_weight: [V, H], any float dtype, may be a memory map; read a few rows at a time.
        head_bias: [V], or None.
        dtype: Of the result; float64 is for checking.

    Raises:
        ValueError: The shortcut is residual, or the shapes do not fit together.
    """
    if shortcut.residual:
        raise ValueError("a residual shortcut can't be folded: its output is not of low rank")
    hidden, k = shortcut.down.shape
    vocabulary = head_weight.shape[0]
    if head_weight.shape != (vocabulary, hidden) or norm.weight.shape != (hidden,):
        raise ValueError(
            f"head {head_weight.shape} and norm {norm.weight.shape} do not fit hidden size {hidden}"
        )
    up = shortcut.up.astype(np.float64)
    if norm.kind == "layer":
        up -= up.mean(axis=1, keepdims=True)
    q, r = np.linalg.qr(up.T)
    mix = shortcut.down.astype(np.float64) @ r.T * np.sqrt(k / hidden)
    columns = norm.weight.astype(np.float64)[:, None] * q * np.sqrt(hidden / k)

    weight = np.empty((vocabulary, k), dtype)
    norm_bias = None if norm.bias is None else norm.bias.astype(np.float64)
    logit_bias = np.zeros(vocabulary) if head_bias is None else head_bias.astype(np.float64)
    for rows, chunk in head_chunks(head_weight, np.dtype(np.float64)):
        weight[rows] = chunk @ columns
        if norm_bias is not None:
            logit_bias[rows] += chunk @ norm_bias
    return FoldedHead(
        project=(shortcut.scale.astype(np.float64)[:, None] * mix).astype(dtype),
        bias=(shortcut.shift.astype(np.float64) @ mix).astype(dtype),
        eps=norm.eps,
        weight=weight,
        logit_bias=None if norm_bias is None and head_bias is None else logit_bias.astype(dtype),
    )
