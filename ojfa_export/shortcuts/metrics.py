"""How well an exit's top token agrees with the full model, on held-out tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ojfa_export.errors import CalibrationError
from ojfa_export.models.head import LanguageHead

_ROWS_AT_ONCE = 256
# Rows whose likeliest tokens are asked for: products are the faster the more there are.
_EVALUATED_AT_ONCE = 1024
_TOP = 10

TokensFunction = Callable[[NDArray[Any]], NDArray[np.integer[Any]]]


class ExitQuality(BaseModel):
    """Agreement of an exit's top token with the full model, averaged over tokens.

    The measures of Din et al., "Jump to Conclusions" (arXiv 2303.09435).

    Attributes:
        precision_at_1: Share of tokens where it is the full model's top token.
        precision_at_5: Share where it is among the full model's top 5.
        precision_at_10: Share where it is among the full model's top 10.
        surprisal: Mean of -ln p_full(token), in nats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision_at_1: float = Field(ge=0, le=1)
    precision_at_5: float = Field(ge=0, le=1)
    precision_at_10: float = Field(ge=0, le=1)
    surprisal: float = Field(ge=0)


class FullModelReference:
    """The full model's predictions for held-out tokens, to compare exits with.

    Args:
        final_hidden: [n, H] the last block's output, before the final norm.
        head: The model's own norm and head, applied in fp32.
        scratch: Folder for a file of 4 n V bytes that holds the log-probabilities; whoever made
            the folder removes it.

    Attributes:
        log_probs: [n, V] fp32 memory map: ln p_full, normalised in float64.
        top_tokens: [n, min(10, V)] token ids, the likeliest first, equals by lower id.

    Raises:
        CalibrationError: Logits that are not finite.
    """

    def __init__(self, final_hidden: NDArray[Any], head: LanguageHead, scratch: Path) -> None:
        n, vocabulary = final_hidden.shape[0], head.weight.shape[0]
        self.log_probs = np.memmap(
            scratch / "full_model_log_probs.f32", np.float32, mode="w+", shape=(n, vocabulary)
        )
        self.top_tokens = np.empty((n, min(_TOP, vocabulary)), np.int64)
        for start in range(0, n, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            logits = head.logits(final_hidden[rows].astype(np.float32))
            if not np.isfinite(logits).all():
                raise CalibrationError(
                    "The full model's logits of the held-out text hold NaN or infinity.",
                    hint="Check the checkpoint's weights; an fp16 one may need to run in fp32.",
                )
            self.log_probs[rows] = _log_softmax(logits)
            self.top_tokens[rows] = _top_tokens(logits, self.top_tokens.shape[1])

    def quality(self, predicted: NDArray[np.integer[Any]]) -> ExitQuality:
        """Compares predicted token ids [n] with the full model's distributions."""
        hits = self.top_tokens == predicted[:, None]
        log_probs = self.log_probs[np.arange(predicted.size), predicted].astype(np.float64)
        return ExitQuality(
            precision_at_1=float(hits[:, :1].any(axis=1).mean()),
            precision_at_5=float(hits[:, :5].any(axis=1).mean()),
            precision_at_10=float(hits.any(axis=1).mean()),
            # A certain token's log-probability may round to just above 0.
            surprisal=max(0.0, float(-log_probs.mean())),
        )


def evaluate(
    likeliest: TokensFunction,
    hidden: NDArray[Any],
    reference: FullModelReference,
    *,
    chunk: int = _EVALUATED_AT_ONCE,
) -> ExitQuality:
    """Measures an exit head on held-out tokens.

    Args:
        likeliest: From hidden states [m, H] in fp32 to the likeliest tokens [m]: `NarrowTokens`
            of a narrow jump, `LanguageHead.likeliest` for the identity shortcut, which reads a
            block's output as if it were the last one's.
        hidden: [n, H] hidden states at the exit, the rows of `reference`.
        reference: The full model's predictions for the same tokens.
        chunk: Rows at a time.
    """
    predicted = [
        likeliest(hidden[start : start + chunk].astype(np.float32))
        for start in range(0, hidden.shape[0], chunk)
    ]
    return reference.quality(np.concatenate(predicted))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _top_tokens(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    candidates = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    candidates.sort(axis=1)
    order = np.argsort(-np.take_along_axis(logits, candidates, axis=1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)
