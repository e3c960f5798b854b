"""Running blocks on the GPU: hidden states, keys and values never leave it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.embedding import embed
from ojfa_export.backends.cuda.kernels import Argument, pointer
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.passes import (
    Chunk,
    Newest,
    Pass,
    load_chunks,
    positions_of,
    row_ranges,
    rows_of,
    slots_of,
    split_pass,
    store_chunks,
    write_rows,
)
from ojfa_export.backends.tensorrt.blocks import Block, Workspace
from ojfa_export.backends.tensorrt.heads import Keeping
from ojfa_export.backends.tensorrt.in_flight import InFlight, NewestDecode
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS
from ojfa_export.backends.tensorrt.memory import Request
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.plan import PREFILL_TOKENS
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import HeadOutput

# Of what follows an exit, so many blocks begin before its check is known.
AHEAD_BLOCKS = 1
# Passes of up to so many tokens of a sequence are recorded: few kinds, each of them often run.
FEW_TOKENS = 8


class TensorRtExecutor:
    """Keys and values [slots, kv_heads, capacity, head_dim] of each block, written in place.

    Passes of one token each are recorded once for each range of blocks and number of tokens: slots
    and positions are read from device memory, so that the recording serves all of them.

    Args:
        model: The opened model.
        in_flight: What is on the device of its newest pass.
        slots: Sequences.
        capacity: Positions of each.

    Attributes:
        arrays: Makes arrays of hidden states.
        key: Of this executor's recordings.
    """

    def __init__(self, model: OpenedModel, in_flight: InFlight, slots: int, capacity: int) -> None:
        model.device.make_current()
        self._model, self._in_flight = model, in_flight
        self._device = model.device
        self.arrays = model.arrays
        self._shape = (slots, model.spec.kv_heads, capacity, model.spec.head_dim)
        self._blocks: dict[int, Block] = {}
        self._opened: set[range] = set()
        self._workspaces: dict[int, Workspace] = {}
        self._recorder = model.device.recorder
        self.key = object()

    def embed(self, tokens: Sequence[int] | HeadOutput, chunks: Sequence[Chunk]) -> DeviceArray:
        """Embeds the tokens of chunks: [tokens, H]."""
        self._device.make_current()  # the caller's thread may be another each time
        positions = positions_of(chunks)
        if not isinstance(tokens, list):
            if self._follows(tokens, positions):
                return self._embed_following(positions)
            tokens = tokens.tokens()  # type: ignore[union-attr]
        count = len(positions)
        self._in_flight.call_off()
        if len(chunks) == count:
            workspace = self.workspace(count)
            workspace.name(tokens, positions)
            key = ("embed", self.key, count)
            self._recorder.add(key, lambda: self._embed(workspace))
        else:
            workspace = Workspace(self._model, count)
            workspace.name(tokens, positions)
            self._recorder.flush()
            self._embed(workspace)
        return workspace.hidden[0]

    def _follows(self, choices: object, positions: Sequence[int]) -> bool:
        """Whether tokens are the newest answer's, at the positions after those of the last step."""
        before = [position - 1 for position in positions]
        return self._model.mailbox.is_newest(choices) and self.workspace(len(positions)).is_placed(
            before
        )

    def _embed_following(self, positions: list[int]) -> DeviceArray:
        """Embeds the newest answer's tokens, known to the device alone."""
        self._in_flight.call_off()
        count, tokens = len(positions), pointer(self._model.mailbox.tokens)
        workspace = self.workspace(count)
        before = pointer(workspace.positions)
        key = ("follow", self.key, count)
        self._recorder.add(key, lambda: self._embed(workspace, (tokens, before), steps=1))
        workspace.moved_to(positions)
        return workspace.hidden[0]

    def _embed(
        self, workspace: Workspace, named: tuple[Argument, Argument] | None = None, steps: int = 0
    ) -> None:
        """Puts the embedding of a workspace's tokens on the stream, into its first buffer.

        Args:
            workspace: The tokens'.
            named: Where ids and positions are, if not where the workspace names them.
            steps: Added to the positions.
        """
        model, hidden = self._model, workspace.hidden[0]
        named = named or workspace.named_at
        kernels, weights = model.kernels[model.precision], model.weights("embed")
        embed(kernels, weights, hidden, named, workspace.positions, steps)

    def run(
        self,
        blocks: range,
        hidden: Float32 | DeviceArray,
        chunks: Sequence[Chunk],
        *,
        long_context: bool,
    ) -> DeviceArray:
        """Runs consecutive blocks on new tokens; see `backends.backend.Executor`."""
        if not self._recorder.pending:  # else this thread has just embedded
            self._device.make_current()
        states = self.arrays.asarray(hidden)
        self._open(blocks, len(states))
        parts = split_pass(chunks, 1)
        if len(parts) == 1:
            return self._run_part(blocks, states, chunks, long_context)
        ranges, result = row_ranges(chunks), self.arrays.empty(states.shape, np.float32)
        for part in parts:
            rows = rows_of(ranges, part)
            some = [chunks[index] for index in part]
            write_rows(result, rows, self._run_part(blocks, states[rows], some, long_context))
        return result

    def _run_part(
        self, blocks: range, states: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        if len(chunks) == len(states):
            return self._decode(blocks, states, chunks, long_context)
        self._in_flight.call_off()
        [chunk] = chunks
        if chunk.length <= FEW_TOKENS:
            return self._few(blocks, states, chunk, long_context)
        slot, start, most = chunk.slot, chunk.start, PREFILL_TOKENS[-1]
        pieces = [
            self._prefill(blocks, states[at : at + most], slot, start + at, long_context)
            for at in range(0, chunk.length, most)
        ]
        return pieces[0] if len(pieces) == 1 else self.arrays.concatenate(pieces)

    def new_states(self) -> DeviceArray:
        """Room for a hidden state of every position; see `backends.backend.Executor`."""
        slots, _, capacity, _ = self._shape
        return self.arrays.empty((slots, capacity, self._model.spec.hidden_size), np.float32)

    def store(self, states: DeviceArray, chunks: Sequence[Chunk], hidden: DeviceArray) -> None:
        """Copies hidden states to their places; see `backends.backend.Executor`."""
        model, count = self._model, hidden.shape[0]
        last = self._in_flight.last_pass
        if last is None or last.executor is not self or not last.holds(hidden):
            store_chunks(states, chunks, hidden)
            return
        kernels = model.kernels[model.precision]
        keeping = Keeping(kernels, states, hidden, self.workspace(count))
        key = ("keep", self.key, states.pointer, hidden.pointer, count)
        self._recorder.add(key, keeping.run)
        self._in_flight.keeping = key, keeping

    def load(self, states: DeviceArray, chunks: Sequence[Chunk]) -> DeviceArray:
        """Hidden states [tokens, H] that were stored."""
        hidden: DeviceArray = load_chunks(self.arrays, states, chunks)
        return hidden

    def can_begin(self, last: NewestDecode) -> bool:
        """Whether blocks can begin after a pass: only these kernels can be called off."""
        return self._model.decode_kernels and last.hidden.shape[0] <= MOST_TOKENS

    def begin(self, last: NewestDecode, blocks: range) -> tuple[tuple[Hashable, ...], Work]:
        """The first blocks after a pass, while its exit's check may call them off on the device.

        They leave the pass's result alone, which the check reads at the same time.

        Returns:
            What to launch, and its key.
        """
        self._in_flight.ahead = blocks = blocks[:AHEAD_BLOCKS]
        count = last.hidden.shape[0]
        self._open(blocks, count)
        return self._pass(blocks, count, last.long_context)

    def unload(self, block: int) -> None:
        """Lets go of a block's weights; its keys and values stay."""
        self._recorder.clear()
        if block in self._blocks:
            self._blocks[block].unload()

    def release(self, slot: int) -> None:
        """Nothing: the cache is one allocation, which the next sequence writes over."""

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies keys and values of a slot's first tokens to another; see `Executor`."""
        for block in self._blocks.values():
            block.copy_prefix(source, target, count)

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self.key)

    def workspace(self, count: int) -> Workspace:
        """The buffers of steps with this many tokens, kept as recordings refer to them."""
        workspace = self._workspaces.get(count)
        if workspace is None:
            workspace = self._workspaces[count] = Workspace(self._model, count, lasting=True)
        return workspace

    def _decode(
        self, blocks: range, hidden: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        count = hidden.shape[0]
        workspace = self.workspace(count)
        result = workspace.hidden[blocks.stop % 2]
        this = NewestDecode(self, blocks.stop, tuple(chunks), long_context, result)
        begun = self._begun(blocks, hidden, this.chunks, long_context)
        if not begun:
            self._in_flight.call_off()
            workspace.place(positions_of(chunks), slots_of(chunks))
            workspace.take(hidden, blocks.start)
        if rest := blocks[begun:]:
            self._recorder.add(*self._pass(rest, count, long_context), self._before(rest, count))
        self._in_flight.ahead, self._in_flight.last_pass = None, this
        return result

    def _begun(
        self, blocks: range, hidden: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> int:
        """With how many of the blocks the last pass has been followed already."""
        last, ahead = self._in_flight.last_pass, self._in_flight.ahead
        if ahead is None or last is None or not last.holds(hidden):
            return 0
        same = (last.executor, last.chunks, last.long_context)
        if same != (self, chunks, long_context):
            return 0
        return len(ahead) if blocks[: len(ahead)] == ahead else 0

    def way(self, step: Pass, newest: Newest) -> Hashable:
        """How tokens get to a depth, where that takes one recording; else None."""
        if step.tokens is None:
            chunks, long_context = step.chunks, step.long_context
            return self._begun(step.blocks, newest.hidden, chunks, long_context) or None
        if not self.workspace(len(step.chunks)).is_of(slots_of(step.chunks)):
            return None
        if isinstance(step.tokens, list):
            return "embed"
        return "follow" if self._follows(step.tokens, positions_of(step.chunks)) else None

    def _open(self, blocks: range, tokens: int) -> None:
        """Makes the blocks' parts of the cache, if all that these tokens need fits."""
        if blocks in self._opened:
            return
        new = [block for block in blocks if block not in self._blocks]
        if new:
            batch, _, capacity, _ = self._shape
            self._model.check_room(Request(blocks, batch, capacity, tokens), self._blocks)
        for block in new:
            self._blocks[block] = Block(self._model, block, self._shape)
        self._opened.add(blocks)

    def _pass(
        self, blocks: range, count: int, long_context: bool
    ) -> tuple[tuple[Hashable, ...], Work]:
        """A pass of one token of each of some sequences, and its key."""
        workspace = self.workspace(count)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context, together=True)

        return (self.key, blocks, count, long_context), work

    def _before(self, blocks: range, count: int) -> Work | None:
        """What must run before a pass is recorded."""
        if self._model.products(count):
            return None
        return lambda: self._blocks[blocks.start].settle(count)

    def _few(
        self, blocks: range, hidden: DeviceArray, chunk: Chunk, long_context: bool
    ) -> DeviceArray:
        """Runs some tokens of one sequence: drafts that are verified, or tokens that catch up."""
        count = chunk.length
        workspace = self.workspace(count)
        workspace.place(positions_of([chunk]), [chunk.slot] * count)
        workspace.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context, together=False)

        key = (self.key, "few", blocks, count, long_context)
        self._recorder.add(key, work, self._before(blocks, count))
        self._recorder.flush()  # a session counts on what it was given: it is no longer pending
        return workspace.hidden[blocks.stop % 2]

    def _prefill(
        self, blocks: range, hidden: DeviceArray, slot: int, start: int, long_context: bool
    ) -> DeviceArray:
        count = len(hidden)
        workspace = Workspace(self._model, count)
        workspace.place(range(start, start + count), [slot] * count)
        workspace.take(hidden, blocks.start)
        for block in blocks:
            self._blocks[block].run(workspace, long_context, together=False)
        return workspace.hidden[blocks.stop % 2]
