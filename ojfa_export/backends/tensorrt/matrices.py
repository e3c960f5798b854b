"""Quantised matrices on the device, in the layout of their products (kernels/numbers.cuh)."""

from __future__ import annotations

from dataclasses import dataclass

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.tensorrt.layout import tiles_of


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

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def tiles(self) -> int:
        """Of TILE rows."""
        return tiles_of(self.shape[0], paired=self.paired)


Matrix = DeviceArray | DeviceMatrix
