"""Small whole numbers out of 32-bit words: the first is in the lowest bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 32


def unpack(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Numbers of rows of words.

    A number of 3, 5, 6 or 7 bits may reach from one word into the next.

    Args:
        words: [rows, words] int32.
        bits: Of a number, 2 to 8.
        count: Numbers of a row.

    Returns:
        [rows, count] uint8.
    """
    rows = len(words)
    bytes_ = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, -1)
    if bits == 8:
        return bytes_[:, :count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        apart = bytes_[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
        return apart.reshape(rows, -1)[:, :count]
    stream = np.unpackbits(bytes_, axis=1, bitorder="little")[:, : count * bits]
    apart = stream.reshape(rows, count, bits)
    padded = np.zeros((rows, count, 8), np.uint8)
    padded[:, :, :bits] = apart
    return np.packbits(padded, axis=2, bitorder="little")[:, :, 0]


def words_of(count: int, bits: int) -> int:
    """Words that so many numbers take."""
    return -(-count * bits // WORD)
