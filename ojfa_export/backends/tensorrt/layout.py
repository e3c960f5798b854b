"""How much room quantised matrices take in the layout of their products (kernels/numbers.cuh)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.weight_format import WeightFormat

# As in the kernels: rows of a tile and columns of a step.
TILE, STEP = 16, 128
LAYOUT_THREADS = 256


def tiles_of(outputs: int, *, paired: bool) -> int:
    """Tiles of a matrix, the last filled up."""
    return math.ceil(outputs / 2 / (TILE // 2)) if paired else math.ceil(outputs / TILE)


def step_bytes(form: WeightFormat) -> int:
    """Bytes of a tile's numbers and scales in a step."""
    return TILE * STEP * form.bits // 8 + 4 * TILE * max(1, STEP // form.group_size)


def words_of(outputs: int, columns: int, form: WeightFormat, *, paired: bool) -> int:
    """Words of four bytes that a matrix takes."""
    steps = math.ceil(columns / STEP)
    return tiles_of(outputs, paired=paired) * steps * step_bytes(form) // 4


def inverse(order: NDArray[np.int32]) -> NDArray[np.int32]:
    """Where each column lies, of the columns in the order in which they lie."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order), dtype=order.dtype)
    return places
