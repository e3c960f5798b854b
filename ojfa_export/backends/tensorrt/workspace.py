"""Buffers that the blocks of a pass work in."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.cuda.device import PinnedArray
from ojfa_export.backends.cuda.kernels import Argument, pointer
from ojfa_export.backends.passes import Chunk, positions_of, slots_of
from ojfa_export.backends.tensorrt.attention import STEP_QUERIES, Chunks
from ojfa_export.backends.tensorrt.opened import OpenedModel

# Of tokens that only fill a pass up: attention leaves them out.
NO_SEQUENCE = -1
# Numbers of chunks that there are recordings for.
CHUNKS = (1, 4, 16, 64, 256, 1024, 4096)


class Buffers:
    """Memory for passes of up to so many tokens, one after the other.

    Args:
        model: The opened model.
        tokens: At most.
        lasting: Whether recordings refer to it.

    Attributes:
        hidden: Two of [tokens, H] fp32; block i reads the (i % 2)th and writes the other.
        qkv: [tokens, (heads + 2 kv_heads) head_dim] fp32.
        mixed: [tokens, heads * head_dim], what attention gives.
        inner: [tokens, intermediate size], of the MLP.
        product: [tokens, H] fp32, of a product whose norm comes before the sum; None without.
    """

    def __init__(self, model: OpenedModel, tokens: int, *, lasting: bool) -> None:
        spec, dtype = model.spec, DTYPES[model.precision]
        new = model.arrays.lasting if lasting else model.arrays.empty
        self.hidden = tuple(new((tokens, spec.hidden_size), np.float32) for _ in range(2))
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv = new((tokens, width), np.float32)
        self.mixed = new((tokens, spec.heads * spec.head_dim), dtype)
        self.inner = new((tokens, spec.intermediate_size), dtype)
        normed = spec.norms_are("after")
        self.product = new((tokens, spec.hidden_size), np.float32) if normed else None


class Workspace:
    """A pass of so many tokens: its part of the buffers, and where its tokens are.

    Args:
        model: The opened model.
        tokens: How many.
        buffers: To work in, which passes of other numbers of tokens use as well; None for some of
            its own.

    Attributes:
        tokens: How many.
        hidden: See `Buffers`.
        qkv: See `Buffers`.
        mixed: See `Buffers`.
        inner: See `Buffers`.
        product: See `Buffers`.
        positions: Address of the tokens' positions.
        sequences: Address of the slots of the tokens.
        launches: Which of the tokens attend together.
    """

    def __init__(self, model: OpenedModel, tokens: int, buffers: Buffers | None = None) -> None:
        self._device, arrays = model.device, model.arrays
        lasting = buffers is not None
        buffers = buffers or Buffers(model, tokens, lasting=False)
        self.tokens = tokens
        self._work_in(buffers)
        # Positions, slots, and two lists of chunks: together at most four times as many as tokens,
        # by rounding, with two numbers each.
        self._places = arrays.empty((10, tokens), np.int32)
        at = self._places.pointer
        self.positions, self.sequences, self._list = (at + i * 4 * tokens for i in range(3))
        # For the tokens of a step: the device reads them from the host's memory, as late as it can.
        self._named = PinnedArray((2, tokens), np.int32) if lasting else None
        self._named_with = 0  # the launch that reads them
        self._positions: list[int] = []
        self._sequences: list[int] = []
        self._listed: list[int] = []
        self.launches: tuple[Chunks, ...] = (Chunks(tokens, 1),)

    def _work_in(self, buffers: Buffers) -> None:
        tokens = self.tokens
        self.hidden = tuple(each[:tokens] for each in buffers.hidden)
        self.qkv, self.mixed = buffers.qkv[:tokens], buffers.mixed[:tokens]
        self.inner = buffers.inner[:tokens]
        self.product = None if buffers.product is None else buffers.product[:tokens]

    def with_buffers(self, buffers: Buffers) -> Workspace:
        """The same tokens, where the device has them now, in buffers of somebody else."""
        other = copy(self)
        other._work_in(buffers)
        return other

    @property
    def named_at(self) -> tuple[Argument, Argument]:
        """Token ids and positions for the embedding, which tells the others where they are."""
        assert self._named is not None
        start = self._named.pointer
        return pointer(start), pointer(start + 4 * self.tokens)

    def name(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Leaves the tokens of a step where the next launch reads them."""
        assert self._named is not None
        if self._device.recorder.done < self._named_with:
            self._device.synchronize()  # the tokens before may not have been read yet
        self._named_with = self._device.recorder.launches + 1
        self._named.array[0], self._named.array[1] = token_ids, positions

    def place(self, chunks: Sequence[Chunk]) -> None:
        """Says whose the tokens are; what the device knows is not copied again.

        Args:
            chunks: Of all tokens, or of the first ones: then the others only fill the pass up.
        """
        positions = positions_of(chunks)
        rest = self.tokens - len(positions)
        if (wanted := positions + [0] * rest) != self._positions:
            self._upload(wanted, self.positions)
            self._positions = wanted
        self.place_slots(chunks)

    def place_slots(self, chunks: Sequence[Chunk]) -> None:
        """Says whose the tokens are as `place` does, but for their positions."""
        slots = slots_of(chunks)
        rest = self.tokens - len(slots)
        if (wanted := slots + [NO_SEQUENCE] * rest) != self._sequences:
            self._upload(wanted, self.sequences)
            self._sequences = wanted
        self._list_chunks(chunks)

    def _list_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Chunks of few tokens attend together, and those of many.

        There are few kinds of launches, so that recordings are found again: numbers of chunks are
        rounded up, those that are too many have no tokens.
        """
        if len(chunks) == self.tokens:
            self.launches = (Chunks(self.tokens, 1),)
            return
        if len(chunks) == 1 and chunks[0].length == self.tokens:
            self.launches = (Chunks(1, self.tokens),)
            return
        few: list[tuple[int, int]] = []
        many: list[tuple[int, int]] = []
        first = 0
        for _, _, count in chunks:
            (few if count <= STEP_QUERIES else many).append((first, count))
            first += count
        longest = max((count for _, count in few), default=1)
        parts = (few, 1 if longest == 1 else STEP_QUERIES), (many, self.tokens)
        listed: list[int] = []
        launches = []
        for part, most in parts:
            if not part:
                continue
            rounded = next(count for count in CHUNKS if count >= len(part))
            launches.append(Chunks(rounded, most, self._list + 4 * len(listed)))
            part += [(0, 0)] * (rounded - len(part))
            listed += [number for both in part for number in both]
        if listed != self._listed:
            self._upload(listed, self._list)
            self._listed = listed
        self.launches = tuple(launches)

    def _upload(self, numbers: list[int], target: int) -> None:
        self._device.upload(np.array(numbers, np.int32), target)

    def places(self) -> tuple[Argument, Argument]:
        """Positions and slots, for a kernel."""
        return pointer(self.positions), pointer(self.sequences)

    def is_of(self, slots: list[int]) -> bool:
        """Whether the device has these slots as the tokens'."""
        return self._sequences == slots

    def is_placed(self, positions: list[int]) -> bool:
        """Whether the device has these positions."""
        return positions == self._positions

    def moved_to(self, positions: list[int]) -> None:
        """Tells of positions that the device gave the tokens."""
        self._positions = positions

    def take(self, hidden: DeviceArray, block: int) -> None:
        """Puts hidden states where a block reads them."""
        target = self.hidden[block % 2]
        if hidden.pointer != target.pointer:
            self._device.copy(hidden.pointer, target.pointer, hidden.nbytes)
