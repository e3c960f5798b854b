"""Memory with a part for each slot of the KV cache: untouched until used, and given back."""

from __future__ import annotations

import math
import mmap

import numpy as np

from ojfa_export.decoding.arrays import Float32


class SlotArray:
    """An array [slots, ...] float32 in memory of its own.

    The operating system takes pages as they are first written, so that a long limit costs nothing
    until it is used, and takes them back when a slot is released.

    Args:
        shape: The first axis is the slots.

    Attributes:
        array: The array.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._slot_bytes = 4 * math.prod(shape[1:])
        # Private: the system doesn't take pages of shared memory back.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(1, shape[0] * self._slot_bytes), flags=flags)
        self.array: Float32 = np.frombuffer(self._memory, np.float32, math.prod(shape)).reshape(
            shape
        )

    def release(self, slot: int) -> None:
        """Gives the whole pages of a slot back; what was in them is lost."""
        first = -(-slot * self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (slot + 1) * self._slot_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > first:
            self._memory.madvise(mmap.MADV_DONTNEED, first, stop - first)
