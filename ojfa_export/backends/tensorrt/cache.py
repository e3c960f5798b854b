"""Running blocks on the GPU: hidden states, keys and values never leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ojfa_export.backends.backend import Float32, Int32
from ojfa_export.backends.tensorrt.arrays import DeviceArray
from ojfa_export.backends.tensorrt.blocks import Block, Workspace
from ojfa_export.backends.tensorrt.device import Graph
from ojfa_export.backends.tensorrt.kernels import integer, pointer
from ojfa_export.backends.tensorrt.plan import PREFILL_TOKENS

if TYPE_CHECKING:
    from ojfa_export.backends.tensorrt.engines import TensorRtEngines

EMBED_THREADS = 256


class TensorRtCache:
    """Keys and values [batch, kv_heads, capacity, head_dim] of each block, written in place.

    One-token steps are recorded once for each range of blocks and number of sequences: positions
    are read from device memory, so that the recording serves every position.

    Args:
        engines: The opened model.
        batch_size: Sequences.
        capacity: Positions of each.

    Attributes:
        arrays: Makes arrays of hidden states.
    """

    def __init__(self, engines: TensorRtEngines, batch_size: int, capacity: int) -> None:
        engines.device.make_current()
        self._engines = engines
        self._device = engines.device
        self.arrays = engines.arrays
        self._shape = (batch_size, engines.spec.kv_heads, capacity, engines.spec.head_dim)
        self._blocks: dict[int, Block] = {}
        self._workspaces: dict[int, Workspace] = {}
        self._graphs: dict[tuple[range, int, bool], Graph | None] = {}

    def embed(self, token_ids: Int32, starts: Sequence[int]) -> DeviceArray:
        """Embeds tokens [rows, tokens] from these positions on: [rows, tokens, H]."""
        rows, tokens = token_ids.shape
        spec, weights = self._engines.spec, self._engines.weights("embed")
        places = np.array(starts)[:, None] + np.arange(tokens)
        both = np.stack([token_ids.reshape(-1), places.reshape(-1)]).astype(np.int32)
        described = self.arrays.asarray(both)
        hidden = self.arrays.empty((rows, tokens, spec.hidden_size), np.float32)
        learned = weights.get("position_embedding")
        self._engines.kernels[self._engines.precision].launch(
            "embed",
            (rows * tokens, 1, 1),
            (EMBED_THREADS, 1, 1),
            (
                pointer(hidden.pointer),
                pointer(weights["token_embedding"].pointer),
                pointer(None if learned is None else learned.pointer),
                pointer(described[0].pointer),
                pointer(described[1].pointer),
                integer(spec.hidden_size),
            ),
        )
        return hidden

    def run_blocks(
        self,
        blocks: range,
        hidden: Float32 | DeviceArray,
        rows: slice,
        starts: Sequence[int],
        *,
        long_context: bool,
    ) -> DeviceArray:
        """Runs consecutive blocks on new tokens; see `backends.backend.Cache`."""
        states = self.arrays.asarray(hidden)
        for block in blocks:
            if block not in self._blocks:
                self._blocks[block] = Block(self._engines, block, self._shape)
        if states.shape[1] == 1:
            return self._decode(blocks, states, rows, starts, long_context)
        most = PREFILL_TOKENS[-1]
        pieces = [
            self._prefill(blocks, states[:, at : at + most], rows, starts[0] + at, long_context)
            for at in range(0, states.shape[1], most)
        ]
        return pieces[0] if len(pieces) == 1 else self.arrays.concatenate(pieces, axis=1)

    def unload(self, block: int) -> None:
        """Lets go of a block's weights; its keys and values stay."""
        self._graphs.clear()
        if block in self._blocks:
            self._blocks[block].unload()

    def _decode(
        self,
        blocks: range,
        hidden: DeviceArray,
        rows: slice,
        starts: Sequence[int],
        long_context: bool,
    ) -> DeviceArray:
        count = len(hidden)
        if count not in self._workspaces:
            self._workspaces[count] = Workspace(self._engines, count)
        workspace = self._workspaces[count]
        workspace.place(starts, range(rows.start, rows.stop))
        workspace.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context, together=True)

        key = (blocks, count, long_context)
        if key not in self._graphs:
            # TensorRT wants to have run once with these shapes before it is recorded.
            self._graphs[key] = None
            work()
        else:
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = self._device.capture(work)
            graph.launch()
        return workspace.hidden[blocks.stop % 2].reshape(*hidden.shape)

    def _prefill(
        self, blocks: range, hidden: DeviceArray, rows: slice, start: int, long_context: bool
    ) -> DeviceArray:
        count = hidden.shape[1]
        workspace = Workspace(self._engines, count)
        workspace.place(range(start, start + count), [rows.start] * count)
        workspace.take(hidden, blocks.start)
        for block in blocks:
            self._blocks[block].run(workspace, long_context, together=False)
        return workspace.hidden[blocks.stop % 2].reshape(*hidden.shape)
