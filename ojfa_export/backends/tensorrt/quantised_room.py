"""Shared memory that products with quantised matrices are launched with.

Of a token or two inputs lie in shared memory beforehand (quantised_linear.cu), of more they come
with the weights (quantised_batch.cu). Numbers are those of the kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.tensorrt.layout import STEP, TILE, step_bytes, tiles_of
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError

FEW = 2  # tokens
# Of few: warps; tiles that a warp takes a step of at once; tiles whose sums are kept, by the
# tokens; and by the bits of a number steps that are on their way, where inputs are normalised.
FEW_WARPS, TOGETHER = 12, 2
KEPT = {1: 16, 2: 8}
NORMED_RING, GIVEN_RING = {4: 3, 8: 2}, 2
# Of more, by the tokens that a kernel is made for: warps, and tiles that are taken together at
# most; and steps that are on their way.
BATCH_WARPS, BATCH_TILES, BATCH_RING = {8: 12, 16: 8, 32: 8}, {8: 2, 16: 4, 32: 2}, 2
# Bytes beyond the inputs of a token, and of its sums of a tile.
SHIFT, SUMS_BYTES = 64, 4 * (TILE + 4)
# What the system and the kernels themselves take of a thread block; of it the system's.
DECLARED, SYSTEM = 1280, 1024


class QuantisedShape(NamedTuple):
    """A matrix: its outputs, its columns, and whether it is paired (`DeviceMatrix`)."""

    outputs: int
    columns: int
    paired: bool


class Room:
    """Shared memory of a device's thread blocks.

    A multiprocessor must not have room for two thread blocks of one product: where one finds room
    behind another of its own, another multiprocessor has none, and the product takes twice as long.
    So what takes less asks for more. Products that normalise their inputs may begin where the one
    before ends, beside it: three thread blocks don't fit, and that one has but one there.

    Args:
        device: Says what there is.
        form: What matrices are stored as.
    """

    def __init__(self, device: Device, form: WeightFormat) -> None:
        self._device, self._form = device, form
        self._all = device.shared_bytes + SYSTEM

    def few(self, shape: QuantisedShape, tokens: int, *, normed: bool = False) -> int | None:
        """Bytes for all inputs at once; None where they find no room, or tokens are more."""
        if tokens > FEW:
            return None
        ring = NORMED_RING[self._form.bits] if normed else GIVEN_RING
        inputs = 2 * STEP * math.ceil(shape.columns / STEP) + SHIFT
        on_the_way = ring * TOGETHER * step_bytes(self._form)
        taken = tokens * inputs + FEW_WARPS * (KEPT[tokens] * tokens * SUMS_BYTES + on_the_way)
        return self._alone(taken, 3 if normed else 2) if self._fits(taken) else None

    def batch(self, shape: QuantisedShape, tokens: int) -> tuple[int, int]:
        """Tiles that are taken together, and bytes.

        Raises:
            BackendError: There is no room for one.
        """
        tiles = tiles_of(shape.outputs, paired=shape.paired)
        each = math.ceil(tiles / min(tiles, self._device.multiprocessors))
        for most in range(BATCH_TILES[made_for(tokens)], 0, -1):
            together = math.ceil(each / math.ceil(each / most))
            taken = self._taken(together, tokens)
            if self._fits(taken):
                return together, self._alone(taken, 2)
        raise BackendError(
            f"products of {tokens} tokens with weights of {self._form.storage} take "
            f"{taken >> 10} KiB of shared memory, and {self._device.name} has "
            f"{self._device.shared_bytes >> 10}",
            hint="use a GPU of compute capability 9.0, or build without --weights",
        )

    def most_tokens(self) -> int:
        """That a product takes at once.

        Raises:
            BackendError: Not even one.
        """
        for tokens in range(max(BATCH_TILES), 1, -1):
            if self._fits(self._taken(1, tokens)):
                return tokens
        self.batch(QuantisedShape(TILE, STEP, paired=False), 1)
        return 1

    def _taken(self, together: int, tokens: int) -> int:
        """By a product of more: steps that are on their way with their inputs, and sums."""
        on_the_way = BATCH_RING * (together * step_bytes(self._form) + 2 * STEP * tokens)
        return BATCH_WARPS[made_for(tokens)] * (on_the_way + together * tokens * SUMS_BYTES)

    def _fits(self, taken: int) -> bool:
        return taken + DECLARED <= self._all

    def _alone(self, taken: int, parts: int) -> int:
        return min(max(taken, self._all // parts), self._device.shared_bytes)


def made_for(tokens: int) -> int:
    """Tokens of the smallest kernel of more that takes these."""
    return next(most for most in BATCH_TILES if tokens <= most)
