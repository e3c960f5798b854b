"""Shared memory that products with quantised matrices are launched with (quantised_linear.cu)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.tensorrt.layout import STEP, TILE, step_bytes, tiles_of
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError

# As in the kernels: the tokens that they are made for; those that a product normalises itself;
# warps for one token or two and for more; tiles that a warp takes a step of at once; tiles whose
# sums are kept; and by the bits of a number, steps that are on their way, by the tokens that a
# kernel is made for and in one that normalises.
MADE_FOR = (2, 4, 8, 16)
NORMED = 2
FEW_WARPS, MANY_WARPS, TOGETHER = 12, 8, 2
KEPT = {1: 16, 2: 8}
RINGS = {4: {2: 2, 4: 2, 8: 3, 16: 3}, 8: {2: 2, 4: 2, 8: 2, 16: 2}}
NORMED_RINGS = {4: 3, 8: 2}
# Bytes beyond the inputs of a token, and of its sums of a tile.
SHIFT, SUMS_BYTES = 64, 4 * (TILE + 4)
# What the system and the kernels themselves take of a thread block; of it the system's.
DECLARED, SYSTEM = 1280, 1024


class QuantisedShape(NamedTuple):
    """A matrix: its outputs, its columns, and whether it is paired (`DeviceMatrix`)."""

    outputs: int
    columns: int
    paired: bool


class Room(NamedTuple):
    """What a thread block has in shared memory.

    Attributes:
        pass_steps: Columns, in steps, of which the inputs are there at once.
        shared_bytes: What it is launched with.
    """

    pass_steps: int
    shared_bytes: int


class Rooms:
    """Shared memory of the products of some tokens.

    Where a multiprocessor has room for thread blocks of two products, the next one's begins while
    one ends. It must not have room for two of one product, else another multiprocessor may have
    none of it: so what takes less asks for more.

    Args:
        device: Says what there is.
        form: What matrices are stored as.
        shapes: Of the model's matrices.
        width: Features that are normalised.
        tokens: How many.

    Raises:
        BackendError: The device has too little.
    """

    def __init__(
        self,
        device: Device,
        form: WeightFormat,
        shapes: Collection[QuantisedShape],
        width: int,
        tokens: int,
    ) -> None:
        self._device, self._form, self._tokens = device, form, tokens
        self._all = device.shared_bytes + SYSTEM
        taken = sorted(
            self._least(shape, normed=shape.columns == width).shared_bytes + DECLARED
            for shape in shapes
        )
        self._beside = sum(taken[-2:]) <= self._all

    def of(self, shape: QuantisedShape, *, normed: bool = False) -> Room:
        """Of a product with a matrix; whether it may normalise its inputs itself."""
        steps, shared = self._least(shape, normed=normed)
        least = self._all // (3 if self._beside else 2)
        return Room(steps, min(max(shared, least), self._device.shared_bytes))

    def _least(self, shape: QuantisedShape, *, normed: bool) -> Room:
        """For all columns at once or, where they don't find room, as few equal parts as do."""
        bits, tokens = self._form.bits, self._tokens
        ring = RINGS[bits][made_for(tokens)]
        if normed and tokens <= NORMED:
            ring = NORMED_RINGS[bits]
        steps, shared = math.ceil(shape.columns / STEP), 0
        for passes in range(1, steps + 1):
            each = math.ceil(steps / passes)
            shared = self._taken(shape, each, ring)
            if shared + DECLARED <= self._all:
                return Room(each, shared)
        raise BackendError(
            f"products of {self._tokens} tokens with weights of {self._form.storage} take "
            f"{shared >> 10} KiB of shared memory, and {self._device.name} has "
            f"{self._device.shared_bytes >> 10}",
            hint="use a GPU of compute capability 9.0, or build without --weights",
        )

    def _taken(self, shape: QuantisedShape, pass_steps: int, ring: int) -> int:
        """Inputs of a pass, sums that are kept, and steps that are on their way."""
        tokens, kept = self._tokens, KEPT.get(self._tokens, TOGETHER)
        if pass_steps * STEP < shape.columns:
            tiles = tiles_of(shape.outputs, paired=shape.paired)
            kept = math.ceil(tiles / min(tiles, self._device.multiprocessors))
        inputs = tokens * (2 * STEP * pass_steps + SHIFT)
        on_the_way = ring * TOGETHER * step_bytes(self._form)
        return inputs + warps_of(tokens) * (kept * tokens * SUMS_BYTES + on_the_way)


def rooms_of(
    device: Device, form: WeightFormat, shapes: Collection[QuantisedShape], width: int
) -> dict[int, Rooms]:
    """By tokens: as many as kernels have sums for, or as find room; see `Rooms`.

    Raises:
        BackendError: Not even one does.
    """
    rooms = {1: Rooms(device, form, shapes, width, 1)}
    for tokens in range(2, MADE_FOR[-1] + 1):
        try:
            rooms[tokens] = Rooms(device, form, shapes, width, tokens)
        except BackendError:
            break
    return rooms


def made_for(tokens: int) -> int:
    """Tokens of the smallest kernel that takes these."""
    return next(most for most in MADE_FOR if tokens <= most)


def warps_of(tokens: int) -> int:
    """Of a thread block."""
    return FEW_WARPS if tokens <= MADE_FOR[0] else MANY_WARPS
