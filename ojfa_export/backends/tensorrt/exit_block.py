"""A block behind an exit on the GPU: a block, and its input (engines/kernels/exit_block.cu)."""

from __future__ import annotations

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.kernels import integer, pointer
from ojfa_export.backends.tensorrt.blocks import Block
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.workspace import Workspace

SCALE_THREADS = 256  # as in the kernel


class ExitBlock(Block):
    """An exit's block, with keys and values of the exit's own; its attention is the last block's.

    Args:
        model: The opened model, among whose graphs the block's is.
        graph: The block's, which several exits may share.
        exit: The exit, numbered from 0: which scale and shift are its.
        cache: Of the executor.
    """

    def __init__(self, model: OpenedModel, graph: str, exit: int, cache: KvCache) -> None:
        super().__init__(model, 0, cache, like=model.spec.blocks - 1)
        self._name, self._exit = graph, exit

    def run_on(self, hidden: DeviceArray, workspace: Workspace, long_context: bool) -> None:
        """Puts the block on the stream; its output is the workspace's second buffer.

        Args:
            hidden: After the exit's blocks, [tokens, H]; may be the workspace's first buffer.
            workspace: The tokens'.
            long_context: Whether LongRoPE's long factors apply.
        """
        weights, width = self._model.weights(self._name), hidden.shape[-1]
        scale, shift = (
            weights[name].pointer + 4 * width * self._exit for name in ("exit.scale", "exit.shift")
        )
        self._model.kernels[self._model.precision].launch(
            "scale_and_shift",
            (workspace.tokens, 1, 1),
            (SCALE_THREADS, 1, 1),
            (
                *map(pointer, (workspace.hidden[0].pointer, hidden.pointer, scale, shift)),
                integer(width),
            ),
            overlapping=True,
        )
        self.run(workspace, long_context)
