"""Host memory that small uploads pass through.

From pageable memory the driver may wait for all that is on the stream before it copies, so that a
pass couldn't be put there while another runs. From pinned memory it doesn't; but then the memory
must stay as it is until the device has read it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SEGMENTS, SEGMENT_BYTES = 4, 256 << 10
ALIGNMENT = 16


class Pinned(Protocol):
    """Pinned host memory; see `cuda.device.PinnedArray`."""

    pointer: int
    array: NDArray[np.uint8]


class Mark(Protocol):
    """A place on the stream."""

    def set(self) -> None:
        """Moves it behind all that is on the stream."""
        ...

    def wait(self) -> None:
        """Waits until the device has passed it; at once if it was never set."""
        ...


class Staging:
    """A ring of segments: one is written again when the device has read what was in it.

    Args:
        memory: Of all segments, pinned.
        mark: Makes marks on the stream.
    """

    def __init__(self, memory: Pinned, mark: Callable[[], Mark]) -> None:
        self._start, self._size = memory.pointer, memory.array.nbytes // SEGMENTS
        self._memory = memory  # which the device may read as long as this is there
        self._marks = [mark() for _ in range(SEGMENTS)]
        self._segment = self._used = 0

    def put(self, source: int, size: int) -> int | None:
        """Copies bytes to where they may be uploaded from next; None where they are too many.

        Args:
            source: Their address.
            size: How many.
        """
        if size > self._size:
            return None
        if self._used + size > self._size:
            self._marks[self._segment].set()
            self._segment, self._used = (self._segment + 1) % SEGMENTS, 0
            self._marks[self._segment].wait()
        at = self._start + self._segment * self._size + self._used
        ctypes.memmove(at, source, size)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return at
