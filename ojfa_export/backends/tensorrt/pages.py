"""Which pages of the KV cache each slot has, on the host and in device memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.tensorrt.attention import PAGE
from ojfa_export.errors import BackendError

# Of a page: its number, and that of the one that takes its place.
Copy = tuple[int, int]


class PageTable:
    """Pages of slots; a page that several slots begin with is there once.

    A slot's pages hold its positions in order. What is shared is never written to: who has new
    tokens for a shared page gets a copy of it first.

    Args:
        device: Where the kernels look the pages up.
        slots: Sequences.
        capacity: Positions of each at most.
        pages: That there are; None for all that all slots may need.

    Attributes:
        most: Pages of a slot at most.
        count: Pages that there are.
    """

    def __init__(self, device: Device, slots: int, capacity: int, pages: int | None = None) -> None:
        self._device = device
        self.most = math.ceil(capacity / PAGE)
        self.count = min(pages or slots * self.most, slots * self.most)
        self._table = np.zeros((slots, self.most), np.int32)
        self._on_device = DeviceArrays(device).upload(self._table)
        self._free = list(range(self.count - 1, -1, -1))
        self._owners = [0] * self.count
        self._held: list[list[int]] = [[] for _ in range(slots)]
        # Of each slot the positions that may be written to: its own pages, after those it shares.
        self._own = [0] * slots
        self._end = [0] * slots

    @property
    def pointer(self) -> int:
        """Address of the table [slots, most] int32."""
        return self._on_device.pointer

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def room(self, slot: int) -> int:
        """Positions that a slot has pages for."""
        return len(self._held[slot]) * PAGE

    def make_ready(self, chunks: Sequence[Chunk]) -> list[Copy]:
        """Gives slots the pages that new tokens are written to.

        Args:
            chunks: The new tokens.

        Returns:
            Pages that must be copied before.

        Raises:
            BackendError: There are no more.
        """
        copies: list[Copy] = []
        for slot, start, count in chunks:
            if self._own[slot] <= start and start + count <= self._end[slot]:
                continue
            copies += self._unshare(slot, start, start + count)
            self._extend(slot, start + count)
            self._note(slot)
        return copies

    def share(self, source: int, target: int, count: int) -> list[Copy]:
        """Gives a slot without pages the first positions of another.

        Returns:
            The page that must be copied, if it is not shared whole.
        """
        self.release(target)
        whole, held = count // PAGE, self._held[target]
        for page in self._held[source][:whole]:
            self._owners[page] += 1
            held.append(page)
        copies: list[Copy] = []
        if count % PAGE:
            held.append(self._take(target))
            copies = [(self._held[source][whole], held[-1])]
        self._note(source)
        self._note(target)
        return copies

    def release(self, slot: int) -> None:
        """Takes a slot's pages back."""
        for page in self._held[slot]:
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
        self._held[slot] = []
        self._own[slot] = self._end[slot] = 0

    def _take(self, slot: int) -> int:
        if not self._free:
            raise BackendError(
                f"the KV cache has no page left for slot {slot}: all {self.count} of {PAGE} "
                "positions are in use",
                hint="use fewer sequences at a time, or give the cache more memory",
            )
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _unshare(self, slot: int, start: int, stop: int) -> list[Copy]:
        held, copies = self._held[slot], []
        for index in range(start // PAGE, min(math.ceil(stop / PAGE), len(held))):
            if self._owners[page := held[index]] > 1:
                held[index] = self._take(slot)
                self._owners[page] -= 1
                copies.append((page, held[index]))
        return copies

    def _extend(self, slot: int, tokens: int) -> None:
        held = self._held[slot]
        while len(held) * PAGE < tokens:
            held.append(self._take(slot))

    def _note(self, slot: int) -> None:
        """Tells the device of a slot's pages."""
        held = self._held[slot]
        shared = (index for index, page in enumerate(held) if self._owners[page] > 1)
        self._own[slot] = (max(shared, default=-1) + 1) * PAGE
        self._end[slot] = len(held) * PAGE
        row = self._table[slot]
        row[: len(held)] = held
        self._device.upload(row, self.pointer + slot * row.nbytes)
