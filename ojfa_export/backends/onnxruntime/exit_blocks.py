"""Block jumps on ONNX Runtime's CPU provider: their blocks run as the model's do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.onnxruntime.executor import OnnxRuntimeExecutor
from ojfa_export.backends.onnxruntime.opened import OpenedModel
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.names import exit_block_name
from ojfa_export.decoding.arrays import Float32


class OnnxRuntimeExitBlocks(OpenedModel):
    """The opened blocks of a block jump; see `backends.exit_blocks.ExitBlocks`.

    Args:
        jump: The jump.
    """

    def __init__(self, jump: BlockJump) -> None:
        super().__init__(jump.spec, jump.weights, jump.engines, jump.rotary, jump.files)
        self.exits, self._blocks = jump.exits, jump.blocks
        self.token_bytes = 4 * 2 * jump.spec.kv_heads * jump.spec.head_dim

    def graph_of(self, block: int) -> str:
        """The name of the graph of an exit's block, exits being numbered from 0."""
        return exit_block_name(block if self._blocks > 1 else 0)

    def executor(
        self, slots: int, capacity: int, pages: int | None = None
    ) -> OnnxRuntimeExitExecutor:
        """Makes caches; memory is taken as positions are written."""
        return OnnxRuntimeExitExecutor(self, slots, capacity)


class OnnxRuntimeExitExecutor:
    """A cache for each exit that is asked; see `backends.exit_blocks.ExitExecutor`.

    Args:
        blocks: The opened blocks.
        slots: Sequences.
        capacity: Positions of each.
    """

    def __init__(self, blocks: OnnxRuntimeExitBlocks, slots: int, capacity: int) -> None:
        # For it each exit is a block with a cache; two of them may have one graph.
        self._executor = OnnxRuntimeExecutor(blocks, slots, capacity)
        self._index = {exit: index for index, exit in enumerate(blocks.exits)}

    def run(
        self, exit: int, hidden: Float32, chunks: Sequence[Chunk], *, long_context: bool
    ) -> Float32:
        """See `backends.exit_blocks.ExitExecutor`."""
        index = self._index[exit]
        return self._executor.run(
            range(index, index + 1),
            hidden,
            chunks,
            long_context=long_context,
            beside={"exit": np.full(len(hidden), index, np.int32)},
        )

    def unload(self, exit: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`."""
        self._executor.unload(self._index[exit])

    def release(self, slot: int) -> None:
        """Gives a slot's pages back to the operating system."""
        self._executor.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `backends.exit_blocks.ExitExecutor`."""
        self._executor.copy_prefix(source, target, count)
