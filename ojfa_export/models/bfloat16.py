"""bf16 in NumPy, which has no such type: the upper 16 bits of a float32, as uint16.

A build has ml_dtypes for it. What runs a bundle only moves such numbers, but for a few that
verification looks at: that is not worth a package more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = np.dtype(np.uint16)


def rounded(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 numbers to the nearest bf16, to the even one of two that are as near."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    # A NaN stays one, whichever bits it has: rounding could make it infinite, or carry beyond.
    quiet = bits >> 16 | np.uint32(0x40)
    return np.where(np.isnan(numbers), quiet, nearest).astype(np.uint16)


def widened(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers in float32: bf16 where they are given as uint16, else of a type that NumPy has."""
    if numbers.dtype != BFLOAT16:
        return numbers.astype(np.float32)
    return (numbers.astype(np.uint32) << 16).view(np.float32)
