"""Block jumps on ONNX Runtime's CUDA provider: their blocks run as the model's do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.onnxruntime_cuda.executor import (
    MOST_TOKENS,
    OnnxRuntimeCudaExecutor,
    Tokens,
)
from ojfa_export.backends.onnxruntime_cuda.opened import OpenedModel
from ojfa_export.backends.onnxruntime_cuda.provider import Array
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.names import exit_block_name
from ojfa_export.decoding.arrays import Float32


class OnnxRuntimeCudaExitBlocks:
    """The blocks of a block jump; see `backends.exit_blocks.ExitBlocks`.

    Args:
        model: The opened model, whose engines theirs are among.
        jump: The jump.
    """

    def __init__(self, model: OpenedModel, jump: BlockJump) -> None:
        self.model, self.exits, self._blocks = model, jump.exits, jump.blocks
        element_bytes = DTYPES[model.precision].itemsize
        self.token_bytes = 2 * jump.spec.kv_heads * jump.spec.head_dim * element_bytes

    def graph_of(self, index: int) -> str:
        """The name of the graph of an exit's block, exits being numbered from 0."""
        return exit_block_name(index if self._blocks > 1 else 0)

    def executor(
        self, slots: int, capacity: int, pages: int | None = None
    ) -> OnnxRuntimeCudaExitExecutor:
        """Makes caches; an exit's takes memory when it is first asked."""
        return OnnxRuntimeCudaExitExecutor(self, slots, capacity)


class OnnxRuntimeCudaExitExecutor:
    """A cache for each exit that is asked; see `backends.exit_blocks.ExitExecutor`.

    Args:
        blocks: The blocks.
        slots: Sequences.
        capacity: Positions of each.
    """

    def __init__(self, blocks: OnnxRuntimeCudaExitBlocks, slots: int, capacity: int) -> None:
        self._executor = _Executor(blocks, slots, capacity)
        self._index = {exit: index for index, exit in enumerate(blocks.exits)}

    def run(
        self,
        exit: int,
        hidden: Float32 | DeviceArray,
        chunks: Sequence[Chunk],
        *,
        long_context: bool,
    ) -> DeviceArray:
        """See `backends.exit_blocks.ExitExecutor`."""
        index = self._index[exit]
        blocks = range(index, index + 1)
        return self._executor.run(blocks, hidden, chunks, long_context=long_context)

    def unload(self, exit: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`."""
        self._executor.unload(self._index[exit])

    def release(self, slot: int) -> None:
        """Nothing: a cache is one allocation, which the next sequence writes over."""

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`."""
        self._executor.copy_prefix(source, target, count)


class _Executor(OnnxRuntimeCudaExecutor):
    """For it each exit is a block with a cache; two of them may have one graph."""

    def __init__(self, blocks: OnnxRuntimeCudaExitBlocks, slots: int, capacity: int) -> None:
        super().__init__(blocks.model, slots, capacity)
        self._blocks = blocks
        # Of as many tokens as run at once, which exit they are of.
        most = max(slots, MOST_TOKENS)
        exits = np.arange(len(blocks.exits), dtype=np.int32)[:, None, None]
        self._exits = self.arrays.upload(np.repeat(exits, most, axis=1))

    def _graph_of(self, block: int) -> str:
        return self._blocks.graph_of(block)

    def _beside(self, block: int, tokens: Tokens) -> dict[str, Array]:
        rows, count, _ = tokens.hidden[0].shape
        return {"exit": self._exits[block, : rows * count].reshape(rows, count)}
