"""Offsets of groups: zero points with a fraction, in a matrix of whole numbers.

    weight = (number - zero point) * scale + offset

x @ W is then what whole zero points give, and each group's sum of x times its offset. One product
does both: a sixteenth of the groups' sums follow x and their sums, and as many rows follow those of
W. These are numbers of four bits: the two digits of an offset, with a scale that all offsets of an
output share. (MatMulNBits takes fractional zero points too, and dequantises a matrix first then:
forty times slower.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BASE = 16
# Rows for each group: its offset's digits.
DIGITS = 2
# Digits are -8 to 7, as numbers of four bits are about their middle; both 7 is the largest offset.
MIDDLE = 8
_MOST = 7 * BASE + 7


def to_digits(offsets: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Writes offsets as rows of a matrix.

    Args:
        offsets: [outputs, groups].

    Returns:
        Numbers [outputs, DIGITS * groups], all first digits before all second ones, and the scale
        [outputs, 1] of their first digits.
    """
    largest = np.abs(offsets).max(axis=1, keepdims=True)
    unit = np.maximum(largest / _MOST, np.finfo(np.float32).tiny, dtype=np.float32)
    whole = np.rint(offsets / unit).astype(np.int32)
    second = (whole + MIDDLE) % BASE - MIDDLE
    first = (whole - second) // BASE
    numbers = np.concatenate([first, second], axis=1) + MIDDLE
    return numbers.astype(np.uint8), unit * np.float32(BASE)


def of_digits(rows: NDArray[Any]) -> NDArray[Any]:
    """The offsets [outputs, groups] of rows [outputs, DIGITS * groups], dequantised."""
    first, second = np.split(rows, DIGITS, axis=1)
    offsets: NDArray[Any] = first + second / BASE
    return offsets


def rounded(offsets: NDArray[np.float32]) -> NDArray[np.float32]:
    """What two digits hold of offsets [outputs, groups]."""
    numbers, scales = to_digits(offsets)
    held: NDArray[np.float32] = of_digits((numbers.astype(np.float32) - MIDDLE) * scales)
    return held
