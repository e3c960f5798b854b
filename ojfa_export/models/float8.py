"""8-bit floats (OCP's e4m3, "fn": up to 448, no infinity) in NumPy, which has no such type.

A build has ml_dtypes to round to them. What runs a bundle only needs what its codes stand for, and
that is a table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST = 448.0
# Bits of a fraction, and the exponent of the smallest number that has them all.
FRACTION_BITS, LEAST_EXPONENT = 3, -6


def _numbers() -> NDArray[np.float32]:
    """What each code stands for, [256]: a sign, four bits of exponent, three of fraction."""
    codes = np.arange(256)
    exponent, fraction = codes >> FRACTION_BITS & 15, codes & 7
    whole = np.where(exponent > 0, 8, 0) + fraction  # of the last place
    sizes = np.ldexp(whole, np.maximum(exponent, 1) - 1 + LEAST_EXPONENT - FRACTION_BITS)
    sizes[codes & 127 == 127] = np.nan
    numbers: NDArray[np.float32] = np.where(codes < 128, sizes, -sizes).astype(np.float32)
    return numbers


E4M3: NDArray[np.float32] = _numbers()


def last_place(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far apart e4m3 numbers are, where these are."""
    least = np.ldexp(np.float32(1), LEAST_EXPONENT)
    _, exponent = np.frexp(np.maximum(np.abs(numbers), least))
    found: NDArray[np.float32] = np.ldexp(np.float32(1), exponent - 1 - FRACTION_BITS)
    return found
