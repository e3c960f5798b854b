"""Passes of a draft layer on the GPU, and the states that it is given; see `backends.draft`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.kernels import integer, pointer
from ojfa_export.backends.cuda.mailbox import ROWS, SLOTS
from ojfa_export.backends.passes import Chunk, Pass, cut_pass, positions_of, row_ranges, slots_of
from ojfa_export.backends.tensorrt.attention import STEP_QUERIES
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.draft_block import DraftBlock, Steps
from ojfa_export.backends.tensorrt.draft_model import DRAFT_TOKENS, DraftModel
from ojfa_export.backends.tensorrt.drafted import DeviceDrafts
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.backends.tensorrt.executor import TensorRtExecutor, is_few
from ojfa_export.backends.tensorrt.heads import KEEP_THREADS
from ojfa_export.backends.tensorrt.pages import Copy
from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS
from ojfa_export.backends.tensorrt.workspace import Buffers, Workspace
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest

# More positions than find room in kernels for few are filled up to one of these numbers.
SIZES = (64, 128, 256, DRAFT_TOKENS)
GREEDY = HeadRequest()


class TensorRtDraftExecutor:
    """The layer's cache in pages, and room [depths, slots, capacity, H] for states.

    Args:
        layer: The opened layer.
        engines: Of the model.
        slots: Sequences.
        capacity: Positions of each.
    """

    def __init__(
        self, layer: DraftModel, engines: TensorRtEngines, slots: int, capacity: int
    ) -> None:
        layer.device.make_current()
        self._layer, self._engines = layer, engines
        self._slots, self._capacity = slots, capacity
        self._device, self._recorder = layer.device, layer.device.recorder
        self._cache = KvCache(layer, slots, capacity)
        self._made: tuple[DraftBlock, DeviceArray] | None = None
        self._buffers: Buffers | None = None
        self._workspaces: dict[int, Workspace] = {}
        # The tokens of a chain by row, after those before its first that its pass embeds as well.
        room = STEP_QUERIES + ROWS * (SLOTS + 1)
        self._ids = layer.arrays.lasting((1, room), np.int32)
        self._said = layer.arrays.lasting((ROWS, layer.spec.hidden_size), np.float32)
        self._key = object()

    def keep(self, index: int, chunks: Sequence[Chunk], hidden: Float32 | DeviceArray) -> None:
        """See `backends.draft.DraftExecutor`."""
        if not self._recorder.pending:  # else this thread has just run blocks
            self._device.make_current()
        _, kept = self._parts()
        hidden = self._layer.arrays.asarray(hidden)
        count, width = hidden.shape
        target = kept.pointer + index * (kept.nbytes // kept.shape[0])
        placed = self._engines.in_flight.placed(hidden, chunks)
        if placed is None:
            places = np.array([positions_of(chunks), slots_of(chunks)], np.int32)
            held = self._layer.arrays.asarray(places)
            self._recorder.flush()
            at, slots = held.pointer, held.pointer + 4 * count
        else:
            at, slots = placed.positions, placed.sequences

        def work() -> None:
            self._layer.kernels[self._layer.precision].launch(
                "keep",
                (count, 1, 1),
                (KEEP_THREADS, 1, 1),
                (
                    *map(pointer, (target, hidden.pointer, at, slots)),
                    *map(integer, (self._capacity, width)),
                ),
                overlapping=True,
            )

        if placed is None:
            work()
        else:
            self._recorder.add(("draft keep", self._key, target, hidden.pointer, count, at), work)

    def begin(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> DeviceArray:
        """See `backends.draft.DraftExecutor`."""
        self._device.make_current()
        self._make_ready(chunks)
        last: dict[int, DeviceArray] = {}
        at = 0
        for piece in cut_pass(chunks, DRAFT_TOKENS):
            count = sum(length for _, _, length in piece)
            outputs = self._run_known(tokens[at : at + count], piece)
            at += count
            for chunk, rows in zip(piece, row_ranges(piece), strict=True):
                last[chunk.slot] = outputs[rows.stop - 1 : rows.stop].copy()
        return self._layer.arrays.concatenate([last[chunk.slot] for chunk in chunks])

    def go_on(
        self, hidden: DeviceArray, tokens: Sequence[int], chunks: Sequence[Chunk]
    ) -> DeviceArray:
        """See `backends.draft.DraftExecutor`."""
        self._device.make_current()
        self._make_ready(chunks)
        result = self._layer.arrays.empty(hidden.shape, np.float32)
        for at in range(0, len(chunks), DRAFT_TOKENS):
            rows = slice(at, at + DRAFT_TOKENS)
            piece = chunks[rows]
            workspace = self._placed(piece)
            workspace.name([*tokens[rows]], positions_of(piece))
            workspace.take(hidden[rows], 0)
            memory = workspace.hidden[0]
            self._add_step("go on", workspace, memory, self._named(workspace))
            result[rows] = workspace.hidden[1]
        return result

    def chain(
        self, tokens: Sequence[int], chunks: Sequence[Chunk], count: int
    ) -> DeviceDrafts | None:
        """See `backends.draft.Chains`: one launch, whatever the number of drafts."""
        rows, count = len(chunks), min(count, SLOTS)
        if rows > ROWS:
            return None
        self._device.make_current()
        self._make_ready(chunks, count - 1)
        recorder, mailbox = self._recorder, self._layer.mailbox
        workspace = self._placed([Chunk(slot, 0, 1) for slot, _, _ in chunks])
        is_one = rows == 1 and chunks[0].length <= STEP_QUERIES
        key = self._key, "chain", chunks[0].length, count
        known = recorder.find(key) if is_one and not recorder.pending else None
        launches = recorder.launches
        if known is not None:
            self._name_few(tokens, chunks)
        else:
            self._add_chain(tokens, chunks, count, workspace)
        if count > 1:
            workspace.moved_to([start + length + count - 2 for _, start, length in chunks])
        mailbox.leave(GREEDY, answers=count)
        if known is not None:
            recorder.replay(known[0])
        else:
            recorder.flush()
            if is_one and recorder.launches == launches + 1:
                recorder.name(key, None)
        outputs = [self._layer.named(mailbox.expect(rows)) for _ in range(count)]
        first = [tokens[part.stop - 1] for part in row_ranges(chunks)]
        return DeviceDrafts(self._first_id, first, outputs)

    def check(self, executor: Executor, step: Pass) -> HeadOutput | None:
        """See `backends.draft.Chains`: one launch."""
        assert isinstance(executor, TensorRtExecutor)
        chunks, recorder, in_flight = step.chunks, self._recorder, self._engines.in_flight
        count = sum(length for _, _, length in chunks)
        if not is_few(chunks):
            return None
        self._device.make_current()
        is_named = count <= ROWS and not recorder.pending and not in_flight.may_be_off
        drafts = step.tokens if isinstance(step.tokens, DeviceDrafts) else None
        lengths = tuple(length for _, _, length in chunks)
        ids = None if drafts is None else drafts.pointer
        key = self._key, executor.key, lengths, ids, step.blocks, step.long_context
        known = recorder.find(key) if is_named else None
        if known is None:
            launches = recorder.launches
            output = self._check_by_parts(executor, step)
            if is_named and recorder.launches == launches + 1:
                recorder.name(key, None)
            return output
        tokens = [0] * count if drafts is not None else step.tokens
        assert isinstance(tokens, list)
        in_flight.last_pass, in_flight.keeping = None, ((), None)
        executor.name_few(tokens, chunks)
        self._layer.mailbox.leave(GREEDY)
        recorder.replay(known[0])
        return self._layer.mailbox.expect(count)

    def _check_by_parts(self, executor: TensorRtExecutor, step: Pass) -> HeadOutput:
        hidden = executor.embed(step.tokens, step.chunks)  # type: ignore[arg-type]
        start, stop, depths = step.blocks.start, step.blocks.stop, self._layer.depths
        cuts = [start, *(depth for depth in depths if depth < stop), stop]
        for blocks in (range(a, b) for a, b in pairwise(cuts)):
            hidden = executor.run_on(blocks, hidden, step.chunks, step.long_context)
            if blocks.stop in depths:
                self.keep(depths.index(blocks.stop), step.chunks, hidden)
        return self._engines.choose(hidden, stop, GREEDY)

    def release(self, slot: int) -> None:
        """See `backends.draft.DraftExecutor`."""
        self._cache.pages.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `backends.draft.DraftExecutor`; whole pages are shared."""
        self._device.make_current()
        pages = self._cache.pages
        # The layer may have run fewer positions than have states.
        self._copy_pages(pages.share(source, target, min(count, pages.room(source))))
        if self._made is None:
            return
        kept = self._made[1]
        each = kept.nbytes // (kept.shape[0] * self._slots)  # of a slot, at a depth
        for at in range(0, kept.nbytes, self._slots * each):
            start = kept.pointer + at
            size = each // self._capacity * count
            self._device.copy(start + source * each, start + target * each, size)

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self._key)

    def _parts(self) -> tuple[DraftBlock, DeviceArray]:
        """The block with its keys and values, and the states; memory is taken when first used."""
        if self._made is None:
            spec = self._layer.spec
            shape = len(self._layer.depths), self._slots, self._capacity, spec.hidden_size
            kept = self._layer.arrays.lasting(shape, np.float32)
            self._made = DraftBlock(self._layer, self._cache), kept
        return self._made

    def _make_ready(self, chunks: Sequence[Chunk], further: int = 0) -> None:
        """Gives slots the pages for positions, and for some after them."""
        longer = [Chunk(slot, start, length + further) for slot, start, length in chunks]
        self._copy_pages(self._cache.pages.make_ready(longer))

    def _copy_pages(self, copies: Sequence[Copy]) -> None:
        for source, target in copies:
            self._parts()[0].copy_page(source, target)

    @property
    def _first_id(self) -> int:
        """Where the ids of a chain begin: the first row's newest token."""
        return self._ids.pointer + 4 * STEP_QUERIES

    def _add_chain(
        self, tokens: Sequence[int], chunks: Sequence[Chunk], count: int, workspace: Workspace
    ) -> None:
        """Adds a chain of drafts; the workspace is that of one position of each row."""
        rows, ids, stride = len(chunks), self._first_id, count + 1
        if rows == 1 and chunks[0].length <= STEP_QUERIES:
            said, positions = self._begin_few(tokens, chunks, ids)
        else:
            said, positions = self._begin_any(tokens, chunks, ids, stride)
        self._layer.ask(said, GREEDY)
        names, chosen = self._layer.names, self._layer.mailbox.tokens
        for draft in range(1, count):
            steps = Steps(chosen, positions, names, ids + 4 * draft, stride, 1)
            self._add_step("chain", workspace, said, steps)
            said, positions = workspace.hidden[1], workspace.positions
            self._layer.ask(said, GREEDY)
        last = Steps(chosen, 0, names, ids + 4 * count, stride)
        key = ("name drafts", self._key, rows, count)
        self._recorder.add(key, lambda: self._parts()[0].name(rows, last))

    def _name_few(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> Workspace:
        """Leaves a few positions of one sequence where a launch finds them."""
        workspace, positions = self._placed(chunks), positions_of(chunks)
        workspace.name([*tokens], positions)
        workspace.moved_to(positions)
        return workspace

    def _begin_few(
        self, tokens: Sequence[int], chunks: Sequence[Chunk], ids: int
    ) -> tuple[DeviceArray, int]:
        """Adds a few positions of one sequence; the output of the last, and its position's address.

        Their ids end at the given address.
        """
        workspace, count = self._name_few(tokens, chunks), chunks[0].length
        self._add_begin(workspace, self._named(workspace, named=ids - 4 * (count - 1)))
        return workspace.hidden[1][count - 1 :], workspace.positions + 4 * (count - 1)

    def _begin_any(
        self, tokens: Sequence[int], chunks: Sequence[Chunk], ids: int, stride: int
    ) -> tuple[DeviceArray, int]:
        """Runs any positions; each last one's output, and the address of their positions."""
        rows = row_ranges(chunks)
        hidden = self.begin(tokens, chunks)
        said = self._said[: len(chunks)]
        self._device.copy(hidden.pointer, said.pointer, hidden.nbytes)
        workspace = self._placed([Chunk(slot, 0, 1) for slot, _, _ in chunks])
        last = [start + length - 1 for _, start, length in chunks]
        workspace.name([tokens[part.stop - 1] for part in rows], last)
        steps = self._named(workspace, named=ids, stride=stride)
        key = ("name first", self._key, len(chunks), stride)
        self._recorder.add(key, lambda: self._parts()[0].name(len(chunks), steps))
        return said, steps.positions

    def _run_known(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> DeviceArray:
        """Runs a pass of positions whose states were kept; [tokens, H], filled up."""
        workspace = self._placed(chunks, fill=True)
        rest = [0] * (workspace.tokens - len(tokens))
        workspace.name([*tokens, *rest], positions_of(chunks) + rest)
        workspace.moved_to(positions_of(chunks) + rest)
        self._add_begin(workspace, self._named(workspace))
        self._recorder.flush()
        return workspace.hidden[1]

    def _add_begin(self, workspace: Workspace, steps: Steps) -> None:
        def work() -> None:
            block, kept = self._parts()
            block.remember(workspace, kept, steps.positions)
            block.step(workspace, workspace.hidden[0], steps)

        key = ("draft begin", self._key, workspace.tokens, workspace.launches, steps)
        self._recorder.add(key, work)

    def _add_step(self, what: str, workspace: Workspace, memory: DeviceArray, steps: Steps) -> None:
        key = (what, self._key, workspace.tokens, memory.pointer, steps)
        self._recorder.add(key, lambda: self._parts()[0].step(workspace, memory, steps))

    def _named(self, workspace: Workspace, named: int = 0, stride: int = 1) -> Steps:
        """Tokens and positions where the host has left them."""
        (ids, _), (positions, _) = workspace.named_at
        return Steps(ids, positions, named=named, stride=stride)

    def _placed(self, chunks: Sequence[Chunk], *, fill: bool = False) -> Workspace:
        """The buffers of a pass, which know its slots; of many tokens filled up where asked."""
        count = sum(length for _, _, length in chunks)
        if fill and count > MOST_TILED_TOKENS:
            count = next(size for size in SIZES if size >= count)
        workspace = self._workspaces.get(count)
        if workspace is None:
            if self._buffers is None:
                self._buffers = Buffers(self._layer, DRAFT_TOKENS, lasting=True)
            workspace = self._workspaces[count] = Workspace(self._layer, count, self._buffers)
        workspace.place_slots(chunks)
        return workspace
