"""Confidence of a head in its next token: three measures, each larger for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.arrays import Float32

Measure = Literal["top", "margin", "entropy"]
# Rows at a time: the terms of so few stay in a core's caches.
_ROWS = 4


def confidence(logits: Float32, measure: Measure) -> NDArray[np.float64]:
    """How sure a head is of its next token; larger is surer.

    Args:
        logits: [n, V].
        measure: "top" is the largest probability; "margin" what it has above the second largest;
            "entropy" the negated entropy in nats, from -log V to 0.

    Returns:
        [n] float64.
    """
    [values] = confidences(logits, (measure,))
    result: NDArray[np.float64] = values
    return result


def confidences(logits: Float32, measures: Sequence[Measure]) -> NDArray[np.float64]:
    """Several measures of `confidence` from one softmax: [measures, n] float64."""
    if len(logits) > _ROWS:
        parts = range(0, len(logits), _ROWS)
        some = [confidences(logits[start : start + _ROWS], measures) for start in parts]
        return np.concatenate(some, axis=1)
    below = logits - logits.max(axis=-1, keepdims=True)
    weights = np.exp(below)
    # Terms in float32, sums in float64: what lies beside the largest is lost in a float32 sum.
    total = weights.sum(axis=-1, dtype=np.float64)
    result = np.empty((len(measures), len(logits)))
    for values, measure in zip(result, measures, strict=True):
        if measure == "entropy":
            # sum p log p with p = w / total and log w = below, which is finite where w is 0.
            products = (weights * below).sum(axis=-1, dtype=np.float64)
            values[:] = products / total - np.log(total)
        elif measure == "margin":
            best = logits.argmax(axis=-1)[:, None]  # where the weight is 1
            np.put_along_axis(weights, best, 0, axis=-1)
            values[:] = (1.0 - weights.max(axis=-1)) / total
            np.put_along_axis(weights, best, 1, axis=-1)
        else:
            values[:] = 1.0 / total
    return result
