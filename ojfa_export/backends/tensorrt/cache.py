"""Running blocks on the GPU: hidden states, keys and values never leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ojfa_export.backends.backend import Float32, Int32
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.device import Recorder
from ojfa_export.backends.tensorrt.blocks import Block, Workspace
from ojfa_export.backends.tensorrt.plan import PREFILL_TOKENS

if TYPE_CHECKING:
    from ojfa_export.backends.tensorrt.engines import TensorRtEngines


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
        self._recorder = Recorder(engines.device)

    def embed(self, token_ids: Int32, starts: Sequence[int]) -> DeviceArray:
        """Embeds tokens [rows, tokens] from these positions on: [rows, tokens, H]."""
        self._device.make_current()  # the caller's thread may be another each time
        rows, tokens = token_ids.shape
        places = [start + token for start in starts for token in range(tokens)]
        if tokens > 1:
            workspace = Workspace(self._engines, rows * tokens)
            workspace.name(token_ids, places)
            self._engines.embed(workspace)
        else:
            workspace = self._workspace(rows)
            workspace.name(token_ids, places)
            self._recorder.run(("embed", rows), lambda: self._engines.embed(workspace))
        return workspace.hidden[0].reshape(rows, tokens, self._engines.spec.hidden_size)

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
        self._device.make_current()
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
        self._recorder.clear()
        if block in self._blocks:
            self._blocks[block].unload()

    def _workspace(self, count: int) -> Workspace:
        """The buffers of steps with this many sequences, kept as recordings refer to them."""
        if count not in self._workspaces:
            self._workspaces[count] = Workspace(self._engines, count)
        return self._workspaces[count]

    def _decode(
        self,
        blocks: range,
        hidden: DeviceArray,
        rows: slice,
        starts: Sequence[int],
        long_context: bool,
    ) -> DeviceArray:
        count = len(hidden)
        workspace = self._workspace(count)
        workspace.place(starts, range(rows.start, rows.stop))
        workspace.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context, together=True)

        self._recorder.run((blocks, count, long_context), work)
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
