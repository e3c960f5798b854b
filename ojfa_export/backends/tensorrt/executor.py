"""Running blocks on the GPU: hidden states, keys and values never leave it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.embedding import embed
from ojfa_export.backends.cuda.kernels import Argument, integer, pointer
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.passes import Chunk, Newest, Pass, cut_pass, positions_of, slots_of
from ojfa_export.backends.tensorrt.attention import PAGE, STEP_QUERIES
from ojfa_export.backends.tensorrt.blocks import Block
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.drafted import DeviceDrafts
from ojfa_export.backends.tensorrt.heads import KEEP_THREADS, Keeping
from ojfa_export.backends.tensorrt.in_flight import InFlight, NewestDecode
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS
from ojfa_export.backends.tensorrt.memory import Request
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.pages import Copy
from ojfa_export.backends.tensorrt.plan import PASS_TOKENS
from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS
from ojfa_export.backends.tensorrt.workspace import Buffers, Workspace
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import HeadOutput

# Of what follows an exit, so many blocks begin before its check is known.
AHEAD_BLOCKS = 1
# Passes of up to so many tokens, few of each sequence, are recorded as they are; others with their
# tokens filled up to one of these numbers, so that there are few recordings. On an H200 192 tokens
# take as long as 256, and 384 nearly as long as 512 (Llama-2-7B's shape).
RECORDED_TOKENS = 256
SIZES = (64, 128, 256, 512, 768, 1024, 1280, 1536, PASS_TOKENS)


class TensorRtExecutor:
    """Passes over a KV cache in pages, which are written in place.

    Passes of few tokens each are recorded once for each range of blocks and number of tokens:
    slots, positions and pages are read from device memory, so that the recording serves all.

    Args:
        model: The opened model.
        in_flight: What is on the device of its newest pass.
        slots: Sequences.
        capacity: Positions of each.
        pages: Of the cache; None for all that all slots may need.

    Attributes:
        arrays: Makes arrays of hidden states.
        key: Of this executor's recordings.
    """

    def __init__(
        self,
        model: OpenedModel,
        in_flight: InFlight,
        slots: int,
        capacity: int,
        pages: int | None = None,
    ) -> None:
        model.device.make_current()
        self._model, self._in_flight = model, in_flight
        self._device = model.device
        self.arrays = model.arrays
        self._slots, self._capacity = slots, capacity
        self._cache = KvCache(model, slots, capacity, pages)
        self._blocks: dict[int, Block] = {}
        self._opened: set[range] = set()
        self._buffers: Buffers | None = None
        self._workspaces: dict[int, Workspace] = {}
        self._recorder = model.device.recorder
        self.key = object()

    def embed(self, tokens: Sequence[int] | HeadOutput, chunks: Sequence[Chunk]) -> DeviceArray:
        """Embeds the tokens of chunks: [tokens, H]."""
        self._device.make_current()  # the caller's thread may be another each time
        self.make_ready(chunks)  # here already: it may have to copy, and nothing is pending yet
        positions = positions_of(chunks)
        few = is_few(chunks)
        if isinstance(tokens, DeviceDrafts) and few:
            return self._embed_few([0] * len(positions), chunks, tokens.pointer)
        if not isinstance(tokens, list):
            if self._follows(tokens, positions):
                return self._embed_following(positions)
            tokens = tokens.tokens()  # type: ignore[union-attr]
        if few:
            return self._embed_few(tokens, chunks)
        self._in_flight.call_off()
        return self._embed_many(tokens, positions)

    def name_few(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """Leaves few tokens where a recording of theirs finds them, which is launched next."""
        self.make_ready(chunks)
        positions = positions_of(chunks)
        workspace = self.workspace(len(positions))
        workspace.place_slots(chunks)
        workspace.name(tokens, positions)
        workspace.moved_to(positions)

    def _embed_few(
        self, tokens: Sequence[int], chunks: Sequence[Chunk], ids: int | None = None
    ) -> DeviceArray:
        """Embeds tokens as part of a recording; of those that the device has, at their address."""
        positions = positions_of(chunks)
        workspace = self.workspace(len(positions))
        workspace.place_slots(chunks)  # an upload, which ends what is put together
        self._in_flight.call_off()
        workspace.name(tokens, positions)
        workspace.moved_to(positions)
        host_ids, at = workspace.named_at
        named = (host_ids if ids is None else pointer(ids)), at
        key = ("embed", self.key, len(positions), ids)
        self._recorder.add(key, lambda: self._embed(workspace, named))
        return workspace.hidden[0]

    def _embed_many(self, tokens: Sequence[int], positions: Sequence[int]) -> DeviceArray:
        model, count = self._model, len(positions)
        named = self.arrays.asarray(np.array([tokens, positions], np.int32))
        hidden = self.arrays.empty((count, model.spec.hidden_size), np.float32)
        ids, at = named.pointer, named.pointer + 4 * count
        kernels, weights = model.kernels[model.precision], model.weights("embed")
        self._recorder.flush()
        chosen = model.mailbox.chosen
        embed(kernels, weights, hidden, (pointer(ids), pointer(at)), at, chosen=chosen)
        return hidden

    def _follows(self, choices: object, positions: Sequence[int]) -> bool:
        """Whether tokens are the newest answer's, at the positions after those of the last step."""
        if not self._model.mailbox.is_newest(choices):
            return False  # of more rows than one answer has, too
        before = [position - 1 for position in positions]
        return self.workspace(len(positions)).is_placed(before)

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
        chosen = model.mailbox.chosen
        embed(kernels, weights, hidden, named, workspace.positions, steps, chosen)

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
        count = len(states)
        self._open(blocks, count)
        self.make_ready(chunks)
        if is_few(chunks):
            result = self.run_on(blocks, states, chunks, long_context)
            if len(chunks) < count:
                # A session counts on what it was given: it is no longer pending.
                self._recorder.flush()
            return result
        self._in_flight.call_off()
        pieces = cut_pass(chunks, self._model.most_pass_tokens())
        if len(pieces) == 1:
            return self._run_many(blocks, states, chunks, long_context)
        result, at = self.arrays.empty(states.shape, np.float32), 0
        for piece in pieces:
            rows = slice(at, at + sum(length for _, _, length in piece))
            result[rows] = self._run_many(blocks, states[rows], piece, long_context)
            at = rows.stop
        return result

    def run_on(
        self, blocks: range, hidden: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        """Runs blocks on few tokens as `run` does, as part of what is launched next."""
        self._open(blocks, len(hidden))
        if len(chunks) == len(hidden):
            return self._decode(blocks, hidden, chunks, long_context)
        return self._add_few(blocks, hidden, chunks, long_context)

    def make_ready(self, chunks: Sequence[Chunk]) -> None:
        """Gives the slots the pages that new tokens are written to."""
        self._copy_pages(self._cache.pages.make_ready(chunks))

    def _copy_pages(self, copies: Sequence[Copy]) -> None:
        for source, target in copies:
            for block in self._blocks.values():
                block.copy_page(source, target)

    def new_states(self) -> DeviceArray:
        """Room for a hidden state of every position; see `backends.backend.Executor`."""
        shape = (self._slots, self._capacity, self._model.spec.hidden_size)
        return self.arrays.empty(shape, np.float32)

    def store(self, states: DeviceArray, chunks: Sequence[Chunk], hidden: DeviceArray) -> None:
        """Copies hidden states to their places; see `backends.backend.Executor`."""
        model, count = self._model, hidden.shape[0]
        last = self._in_flight.last_pass
        if last is None or last.executor is not self or not last.holds(hidden):
            self._move("keep", chunks, states, hidden)
            return
        kernels = model.kernels[model.precision]
        keeping = Keeping(kernels, states, hidden, self.workspace(count))
        key = ("keep", self.key, states.pointer, hidden.pointer, count)
        self._recorder.add(key, keeping.run)
        self._in_flight.keeping = key, keeping

    def load(self, states: DeviceArray, chunks: Sequence[Chunk]) -> DeviceArray:
        """Hidden states [tokens, H] that were stored."""
        count = sum(length for _, _, length in chunks)
        hidden = self.arrays.empty((count, states.shape[-1]), np.float32)
        self._move("fetch", chunks, hidden, states)
        return hidden

    def _move(
        self, kernel: str, chunks: Sequence[Chunk], target: DeviceArray, source: DeviceArray
    ) -> None:
        """Copies hidden states of tokens to or from where they are kept."""
        places = self.arrays.asarray(np.array([positions_of(chunks), slots_of(chunks)], np.int32))
        count, model = places.shape[1], self._model
        at = places.pointer
        self._recorder.flush()
        model.kernels[model.precision].launch(
            kernel,
            (count, 1, 1),
            (KEEP_THREADS, 1, 1),
            (
                *(pointer(target.pointer), pointer(source.pointer)),
                *(pointer(at), pointer(at + 4 * count)),
                *(integer(self._capacity), integer(source.shape[-1])),
            ),
        )

    def can_begin(self, last: NewestDecode) -> bool:
        """Whether blocks can begin after a pass: only steps of few tokens can be called off."""
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
        """Gives a slot's pages to whoever needs them."""
        self._cache.pages.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Lets a slot begin with another's first tokens; see `Executor`. Whole pages are shared."""
        self._copy_pages(self._cache.pages.share(source, target, count))

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self.key)

    def workspace(self, count: int) -> Workspace:
        """The buffers of steps with this many tokens, kept as recordings refer to them."""
        workspace = self._workspaces.get(count)
        if workspace is None:
            if self._buffers is None:
                self._buffers = Buffers(self._model, PASS_TOKENS, lasting=True)
            workspace = self._workspaces[count] = Workspace(self._model, count, self._buffers)
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
            workspace.place(chunks)
            workspace.take(hidden, blocks.start)
        if rest := blocks[begun:]:
            self._recorder.add(*self._pass(rest, count, long_context), self._before(rest, count))
        self._in_flight.ahead, self._in_flight.last_pass = None, this
        self._in_flight.ran(result, this.chunks, workspace)
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
        if len(step.chunks) > RECORDED_TOKENS:
            return None
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
            self._model.check_room(self._request(blocks, tokens), self._blocks)
        for block in new:
            self._blocks[block] = Block(self._model, block, self._cache)
        self._opened.add(blocks)

    def _request(self, blocks: range, tokens: int) -> Request:
        pages, slots = self._cache.pages, self._slots
        if pages.count == slots * pages.most:
            return Request(blocks, slots, self._capacity, tokens)
        return Request(blocks, 1, pages.count * PAGE, tokens)

    def _pass(
        self, blocks: range, count: int, long_context: bool
    ) -> tuple[tuple[Hashable, ...], Work]:
        """A pass of one token of each of some sequences, and its key."""
        workspace = self.workspace(count)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context)

        return (self.key, blocks, count, long_context), work

    def _before(self, blocks: range, count: int) -> Work | None:
        """What must run before a pass is recorded."""
        if self._model.products(count):
            return None
        return lambda: self._blocks[blocks.start].settle(count)

    def _add_few(
        self, blocks: range, hidden: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        """Adds some tokens of each sequence: drafts that are verified, or tokens that catch up."""
        count = hidden.shape[0]
        self._in_flight.call_off()
        workspace = self.workspace(count)
        workspace.place(chunks)
        workspace.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context)

        key = (self.key, "few", blocks, count, workspace.launches, long_context)
        self._recorder.add(key, work, self._before(blocks, count))
        result = workspace.hidden[blocks.stop % 2]
        self._in_flight.ran(result, chunks, workspace)
        return result

    def _run_many(
        self, blocks: range, hidden: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        """Runs any chunks, filled up to one of few numbers of tokens."""
        count = len(hidden)
        workspace = self.workspace(next(size for size in SIZES if size >= count))
        workspace.place(chunks)
        workspace.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context)

        tokens = workspace.tokens
        key = (self.key, "many", blocks, tokens, workspace.launches, long_context)
        self._recorder.add(key, work, self._before(blocks, tokens))
        self._recorder.flush()
        result = workspace.hidden[blocks.stop % 2][:count]
        self._in_flight.ran(result, chunks, workspace)
        return result


def is_few(chunks: Sequence[Chunk]) -> bool:
    """Whether a pass has few tokens of each sequence, and is recorded as it is.

    One longer chunk among steps is as a rule the rest of a prompt. Its length is any, so that such
    a pass is filled up like others with prompts: there would be too many recordings.
    """
    lengths = [length for _, _, length in chunks]
    count = sum(lengths)
    if count > RECORDED_TOKENS or max(lengths) > STEP_QUERIES:
        return False
    return count <= MOST_TILED_TOKENS or len(lengths) - lengths.count(1) != 1
