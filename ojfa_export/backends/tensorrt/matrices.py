"""Quantised matrices on the device, in the layout of their products (kernels/numbers.cuh)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.bundle.weight_format import WeightFormat

# As in the kernels: rows of a tile and columns of a step.
TILE, STEP = 16, 128
LAYOUT_THREADS = 256


@dataclass(frozen=True)
class DeviceMatrix:
    """A quantised matrix [outputs, columns] on the device.

    Attributes:
        array: All of it, words.
        shape: Outputs and columns.
        paired: Whether its outputs are gates and what they are multiplied with, eight of each in a
            tile.
        order: [columns] int32, the column of each that lies there; None where they are in order.
        places: [columns] int32, where each column lies.
    """

    array: DeviceArray
    shape: tuple[int, int]
    paired: bool
    order: DeviceArray | None = None
    places: DeviceArray | None = None

    @property
    def tiles(self) -> int:
        """Of TILE rows."""
        return tiles_of(self.shape[0], paired=self.paired)


Matrix = DeviceArray | DeviceMatrix


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


def inverse(
    order: np.ndarray[tuple[int], np.dtype[np.int32]],
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Where each column lies, of the columns in the order in which they lie."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order), dtype=order.dtype)
    return places
