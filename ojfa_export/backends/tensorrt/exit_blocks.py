"""Block jumps on the GPU: their blocks run as the model's do; see `backends.exit_blocks`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.passes import Chunk, cut_pass
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.backends.tensorrt.executor import is_few
from ojfa_export.backends.tensorrt.exit_block import ExitBlock
from ojfa_export.backends.tensorrt.pages import Copy
from ojfa_export.backends.tensorrt.workspace import Buffers, Workspace
from ojfa_export.bundle.names import exit_block_name
from ojfa_export.decoding.arrays import Float32

# Tokens that run at once; more than are recorded as they are, are filled up to one of the numbers.
EXIT_TOKENS = 512
SIZES = (64, 128, 256, EXIT_TOKENS)


class TensorRtExitBlocks:
    """The blocks of a block jump; see `backends.exit_blocks.ExitBlocks`.

    Args:
        model: The opened model, among whose graphs theirs are.
        jump: The jump.
    """

    def __init__(self, model: TensorRtEngines, jump: BlockJump) -> None:
        self.model, self.exits, self._blocks = model, jump.exits, jump.blocks
        heads = jump.spec.kv_heads * jump.spec.head_dim
        self.token_bytes = 2 * heads * model.cache_dtype.itemsize

    def graph_of(self, exit: int) -> str:
        """The name of the graph of an exit's block."""
        return exit_block_name(self.exits.index(exit) if self._blocks > 1 else 0)

    def executor(self, slots: int, capacity: int, pages: int | None = None) -> TensorRtExitExecutor:
        """Makes caches; an exit's takes memory when it is first asked."""
        return TensorRtExitExecutor(self, slots, capacity, pages)


class TensorRtExitExecutor:
    """Keys and values of each exit, in pages that the exits share the table of.

    A pass right behind the model's is part of the same launch, and finds its tokens where that has
    them.

    Args:
        blocks: The blocks.
        slots: Sequences.
        capacity: Positions of each.
        pages: Of an exit's cache; None for all that all slots may need.
    """

    def __init__(
        self, blocks: TensorRtExitBlocks, slots: int, capacity: int, pages: int | None
    ) -> None:
        self._jump, self._model = blocks, blocks.model
        self._device, self._recorder = self._model.device, self._model.device.recorder
        self._device.make_current()
        self._cache = KvCache(self._model, slots, capacity, pages)
        self._blocks: dict[int, ExitBlock] = {}  # by exit
        self._buffers: Buffers | None = None
        self._workspaces: dict[int, Workspace] = {}
        self._key = object()  # of its recordings

    def run(
        self,
        exit: int,
        hidden: Float32 | DeviceArray,
        chunks: Sequence[Chunk],
        *,
        long_context: bool,
    ) -> DeviceArray:
        """See `backends.exit_blocks.ExitExecutor`."""
        if not self._recorder.pending:  # else this thread has just run blocks
            self._device.make_current()
        states, in_flight = self._model.arrays.asarray(hidden), self._model.in_flight
        self._open(exit)
        self._copy_pages(self._cache.pages.make_ready(chunks))
        if in_flight.may_be_off:
            in_flight.call_off()
        placed = in_flight.placed(states, chunks)
        if placed is not None and placed.tokens <= EXIT_TOKENS:
            workspace = placed.with_buffers(self._room())
            result = self._run(exit, states, chunks, workspace, long_context)
            if in_flight.last_pass is not None and in_flight.last_pass.holds(states):
                in_flight.last_pass.behind = result  # a check of it may begin what follows
            return result
        pieces = cut_pass(chunks, EXIT_TOKENS)
        if len(pieces) == 1:
            return self._run_any(exit, states, chunks, long_context)
        result, at = self._model.arrays.empty(states.shape, np.float32), 0
        for piece in pieces:
            rows = slice(at, at + sum(length for _, _, length in piece))
            result[rows] = self._run_any(exit, states[rows], piece, long_context)
            at = rows.stop
        return result

    def unload(self, exit: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`."""
        self._model.close(self._jump.graph_of(exit))

    def release(self, slot: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`."""
        self._cache.pages.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`; whole pages are shared."""
        self._device.make_current()
        pages = self._cache.pages
        # No exit may have run as many tokens.
        self._copy_pages(pages.share(source, target, min(count, pages.room(source))))

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self._key)

    def _run_any(
        self, exit: int, states: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        """Runs tokens of which the device doesn't know yet where they are."""
        workspace = self._workspace(len(states), chunks)
        workspace.place(chunks)
        workspace.take(states, 0)
        source = workspace.hidden[0][: len(states)]
        return self._run(exit, source, chunks, workspace, long_context)

    def _run(
        self,
        exit: int,
        states: DeviceArray,
        chunks: Sequence[Chunk],
        workspace: Workspace,
        long_context: bool,
    ) -> DeviceArray:
        block, tokens = self._blocks[exit], workspace.tokens

        def work() -> None:
            block.run_on(states, workspace, long_context)

        where = states.pointer, workspace.positions, workspace.launches
        key = ("exit", self._key, exit, tokens, *where, long_context)
        engines = self._model.products(tokens) is None
        self._recorder.add(key, work, (lambda: block.settle(tokens)) if engines else None)
        if len(chunks) < len(states):
            # A session counts on what it was given: it is no longer pending.
            self._recorder.flush()
        return workspace.hidden[1][: len(states)]

    def _open(self, exit: int) -> None:
        """Makes an exit's keys and values."""
        if exit not in self._blocks:
            graph, index = self._jump.graph_of(exit), self._jump.exits.index(exit)
            self._blocks[exit] = ExitBlock(self._model, graph, index, self._cache)

    def _copy_pages(self, copies: Sequence[Copy]) -> None:
        for source, target in copies:
            for block in self._blocks.values():
                block.copy_page(source, target)

    def _room(self) -> Buffers:
        """What all passes work in; memory is taken when an exit is first asked."""
        if self._buffers is None:
            self._buffers = Buffers(self._model, EXIT_TOKENS, lasting=True)
        return self._buffers

    def _workspace(self, count: int, chunks: Sequence[Chunk]) -> Workspace:
        tokens = count if is_few(chunks) else next(size for size in SIZES if size >= count)
        if tokens not in self._workspaces:
            self._workspaces[tokens] = Workspace(self._model, tokens, self._room())
        return self._workspaces[tokens]
