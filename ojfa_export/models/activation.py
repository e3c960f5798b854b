"""Activation functions in NumPy, in the precision of what they are given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.models.spec import Activation


def activate(x: NDArray[Any], kind: Activation) -> NDArray[Any]:
    """An activation function of each value.

    Args:
        x: Any shape, float32 or float64.
        kind: Which; the names are those of `ModelSpec.activation`.
    """
    y: NDArray[Any]
    with np.errstate(over="ignore"):  # exp of a large number: the limit is right
        if kind == "silu":
            y = x / (1 + np.exp(-x))
        elif kind == "relu":
            y = np.maximum(x, 0)
        elif kind == "gelu_tanh":
            y = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            y = 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return y


def gated(x: NDArray[Any], kind: Activation) -> NDArray[Any]:
    """act(gate) * up, of gate and up side by side [..., 2 width]: [..., width]."""
    gate, up = np.split(x, 2, axis=-1)
    y: NDArray[Any] = activate(gate, kind) * up
    return y


def softcapped(x: NDArray[Any], cap: float | None) -> NDArray[Any]:
    """tanh(x / cap) * cap, which stays within the cap; x where there is none."""
    if cap is None:
        return x
    y: NDArray[Any] = np.tanh(x / x.dtype.type(cap)) * x.dtype.type(cap)
    return y


def _erf(x: NDArray[Any]) -> NDArray[Any]:
    """The error function; NumPy has none, and Python's takes one number at a time."""
    result: NDArray[Any] = np.vectorize(math.erf, otypes=[x.dtype])(x)
    return result
