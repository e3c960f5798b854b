"""Running blocks on the GPU: hidden states, keys and values never leave it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ojfa_export.backends.backend import Float32, Int32, keep
from ojfa_export.backends.choice import Choices, OneToken
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.kernels import pointer
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.tensorrt.blocks import Block, Workspace
from ojfa_export.backends.tensorrt.heads import Keeping
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS
from ojfa_export.backends.tensorrt.memory import Request
from ojfa_export.backends.tensorrt.plan import PREFILL_TOKENS

if TYPE_CHECKING:
    from ojfa_export.backends.tensorrt.engines import TensorRtEngines


# Of what follows an exit, so many blocks begin before its check is known.
AHEAD_BLOCKS = 1
# Passes of up to so many tokens of a sequence are recorded: few kinds, each of them often run.
FEW_TOKENS = 8


@dataclass(slots=True)
class Pass:
    """A one-token pass, as long as its result lies where it was computed.

    Attributes:
        cache: Whose.
        block: The one after it.
        rows: Sequences.
        starts: Their positions.
        long_context: As of `TensorRtCache.run_blocks`.
        hidden: The result, [rows, 1, H].
    """

    cache: TensorRtCache
    block: int
    rows: slice
    starts: list[int]
    long_context: bool
    hidden: DeviceArray

    def holds(self, states: DeviceArray) -> bool:
        """Whether hidden states are the pass's result."""
        hidden = self.hidden
        return states.pointer == hidden.pointer and states.shape[0] == hidden.shape[0]


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
        key: Of this cache's recordings.
    """

    def __init__(self, engines: TensorRtEngines, batch_size: int, capacity: int) -> None:
        engines.device.make_current()
        self._engines = engines
        self._device = engines.device
        self.arrays = engines.arrays
        self._shape = (batch_size, engines.spec.kv_heads, capacity, engines.spec.head_dim)
        self._blocks: dict[int, Block] = {}
        self._opened: set[range] = set()
        self._workspaces: dict[int, Workspace] = {}
        self._recorder = engines.device.recorder
        self.key = object()

    def embed(self, token_ids: Int32 | Choices, starts: Sequence[int]) -> DeviceArray:
        """Embeds tokens [rows, tokens] from these positions on: [rows, tokens, H]."""
        self._device.make_current()  # the caller's thread may be another each time
        if not isinstance(token_ids, np.ndarray):
            if self._follows(token_ids, starts):
                return self._embed_following(list(starts))
            token_ids = np.array(token_ids.tokens(), np.int32)[:, None]
        rows, tokens = token_ids.shape
        self._engines.call_off()
        if tokens > 1:
            places = [start + token for start in starts for token in range(tokens)]
            workspace = Workspace(self._engines, rows * tokens)
            workspace.name(token_ids, places)
            self._recorder.flush()
            self._engines.embed(workspace)
        else:
            workspace = self.workspace(rows)
            workspace.name(token_ids, starts)
            key = ("embed", self.key, rows)
            self._recorder.add(key, lambda: self._engines.embed(workspace))
            return workspace.steps[0]
        return workspace.hidden[0].reshape(rows, tokens, self._engines.spec.hidden_size)

    def _follows(self, choices: Choices | None, starts: Sequence[int]) -> bool:
        """Whether tokens are the newest answer's, at the positions after those of the last step."""
        before = [start - 1 for start in starts]
        return self._engines.mailbox.is_newest(choices) and self.workspace(len(starts)).is_placed(
            before
        )

    def _embed_following(self, starts: list[int]) -> DeviceArray:
        """Embeds the newest answer's tokens, known to the device alone."""
        self._engines.call_off()
        rows, tokens = len(starts), pointer(self._engines.mailbox.tokens)
        workspace = self.workspace(rows)
        before = pointer(workspace.positions)
        key = ("follow", self.key, rows)
        self._recorder.add(key, lambda: self._engines.embed(workspace, (tokens, before), steps=1))
        workspace.moved_to(starts)
        return workspace.steps[0]

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
        if not self._recorder.pending:  # else this thread has just embedded
            self._device.make_current()
        states = self.arrays.asarray(hidden)
        count, tokens, _ = states.shape
        self._open(blocks, count * tokens)
        if tokens == 1:
            return self._decode(blocks, states, rows, list(starts), long_context)
        self._engines.call_off()
        if tokens <= FEW_TOKENS:
            return self._few(blocks, states, rows, starts[0], long_context)
        most = PREFILL_TOKENS[-1]
        pieces = [
            self._prefill(blocks, states[:, at : at + most], rows, starts[0] + at, long_context)
            for at in range(0, states.shape[1], most)
        ]
        return pieces[0] if len(pieces) == 1 else self.arrays.concatenate(pieces, axis=1)

    def keep(
        self, kept: DeviceArray, rows: slice, starts: Sequence[int], hidden: DeviceArray
    ) -> None:
        """Copies hidden states for later; see `backends.backend.Cache`."""
        engines, count = self._engines, hidden.shape[0]
        last = engines.last_pass
        if last is None or last.cache is not self or not last.holds(hidden):
            keep(kept, rows, starts, hidden)
            return
        kernels = engines.kernels[engines.precision]
        keeping = Keeping(kernels, kept, hidden, self.workspace(count))
        key = ("keep", self.key, kept.pointer, hidden.pointer, count)
        self._recorder.add(key, keeping.run)
        engines.keeping = key, keeping

    def can_begin(self, last: Pass) -> bool:
        """Whether blocks can begin after a pass: only these kernels can be called off."""
        return self._engines.decode_kernels and last.hidden.shape[0] <= MOST_TOKENS

    def begin(self, last: Pass, blocks: range) -> tuple[tuple[Hashable, ...], Work]:
        """The first blocks after a pass, while its exit's check may call them off on the device.

        They leave the pass's result alone, which the check reads at the same time.

        Returns:
            What to launch, and its key.
        """
        self._engines.ahead = blocks = blocks[:AHEAD_BLOCKS]
        count = last.hidden.shape[0]
        self._open(blocks, count)
        return self._pass(blocks, count, last.long_context)

    def unload(self, block: int) -> None:
        """Lets go of a block's weights; its keys and values stay."""
        self._recorder.clear()
        if block in self._blocks:
            self._blocks[block].unload()

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self.key)

    def workspace(self, count: int) -> Workspace:
        """The buffers of steps with this many sequences, kept as recordings refer to them."""
        workspace = self._workspaces.get(count)
        if workspace is None:
            workspace = self._workspaces[count] = Workspace(self._engines, count, lasting=True)
        return workspace

    def _decode(
        self,
        blocks: range,
        hidden: DeviceArray,
        rows: slice,
        starts: list[int],
        long_context: bool,
    ) -> DeviceArray:
        engines, count = self._engines, hidden.shape[0]
        workspace = self.workspace(count)
        result = workspace.steps[blocks.stop % 2]
        this = Pass(self, blocks.stop, rows, starts, long_context, result)
        begun = self._begun(blocks, hidden, this)
        if not begun:
            engines.call_off()
            workspace.place(starts, range(rows.start, rows.stop))
            workspace.take(hidden, blocks.start)
        if rest := blocks[begun:]:
            self._recorder.add(*self._pass(rest, count, long_context), self._before(rest, count))
        engines.ahead, engines.last_pass = None, this
        return result

    def _begun(self, blocks: range, hidden: DeviceArray, this: Pass | OneToken) -> int:
        """With how many of the blocks the last pass has been followed already."""
        last, ahead = self._engines.last_pass, self._engines.ahead
        if ahead is None or last is None or not last.holds(hidden):
            return 0
        same = (last.cache, last.rows, last.starts, last.long_context)
        if same != (self, this.rows, this.starts, this.long_context):
            return 0
        return len(ahead) if blocks[: len(ahead)] == ahead else 0

    def way(self, one: OneToken, depth: int) -> Hashable:
        """How tokens get to a depth, where that takes one recording; else None."""
        if one.hidden is not None:
            return self._begun(range(one.depth, depth), one.hidden, one) or None
        if not self.workspace(len(one.starts)).is_of(one.rows):
            return None
        if isinstance(one.tokens, list):
            return "embed"
        return "follow" if self._follows(one.tokens, one.starts) else None

    def _open(self, blocks: range, tokens: int) -> None:
        """Makes the blocks' parts of the cache, if all that these tokens need fits."""
        if blocks in self._opened:
            return
        new = [block for block in blocks if block not in self._blocks]
        if new:
            batch, _, capacity, _ = self._shape
            self._engines.check_room(Request(blocks, batch, capacity, tokens), self._blocks)
        for block in new:
            self._blocks[block] = Block(self._engines, block, self._shape)
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
        if self._engines.products(count):
            return None
        return lambda: self._blocks[blocks.start].settle(count)

    def _few(
        self, blocks: range, hidden: DeviceArray, rows: slice, start: int, long_context: bool
    ) -> DeviceArray:
        """Runs some tokens of one sequence: drafts that are checked, or tokens that catch up."""
        count = hidden.shape[1]
        workspace = self.workspace(count)
        workspace.place(range(start, start + count), [rows.start] * count)
        workspace.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                self._blocks[block].run(workspace, long_context, together=False)

        key = (self.key, "few", blocks, count, long_context)
        self._recorder.add(key, work, self._before(blocks, count))
        self._recorder.flush()  # a session counts on what it was given: it is no longer pending
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
