"""Running blocks on ONNX Runtime's CUDA provider: nothing but positions goes to the GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from ojfa_export.backends.backend import Float32, Int32, keep
from ojfa_export.backends.choice import Choices
from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.cuda.embedding import embed
from ojfa_export.backends.cuda.kernels import pointer
from ojfa_export.backends.onnxruntime_cuda.provider import Array, Work
from ojfa_export.bundle.names import block_name

if TYPE_CHECKING:
    from ojfa_export.backends.onnxruntime_cuda.engines import OnnxRuntimeCudaEngines

# Tokens of a prompt that run at once; and with fp32's attention, bytes of their scores.
MOST_TOKENS = 1024
SCORE_BYTES = 256 << 20


class Tokens:
    """Buffers of a pass over some tokens: one of each of several sequences, or many of one.

    Args:
        engines: The opened model.
        rows: Sequences.
        tokens: Of each.
        lasting: Whether recordings refer to them.

    Attributes:
        hidden: Two buffers [rows, tokens, H] fp32; block i reads the (i % 2)th and writes the
            other.
    """

    def __init__(
        self, engines: OnnxRuntimeCudaEngines, rows: int, tokens: int, *, lasting: bool = False
    ) -> None:
        spec = engines.spec
        self._engines = engines
        new = engines.arrays.lasting if lasting else engines.arrays.empty
        shape = (rows, tokens, spec.hidden_size)
        self.hidden = tuple(new(shape, np.float32) for _ in range(2))
        self._described = new((2, rows, tokens), np.int32)
        self._ids, self._positions = self._described[0], self._described[1]
        # With one token each, the last positions are the positions.
        self._last = self._positions if tokens == 1 else new((rows, 1), np.int32)
        self._starts: list[int] = []
        self.works: dict[tuple[int, int, bool], Work] = {}

    def name(self, token_ids: Int32, starts: Sequence[int]) -> None:
        """Says which tokens they are, and where: one copy to the device."""
        positions = self._place(starts)
        self._engines.device.upload(np.stack([token_ids, positions]), self._described.pointer)

    def embed(self) -> None:
        """Puts the embedding on the stream, into the first buffer."""
        inputs = {"token_ids": self._ids, "positions": self._positions}
        self._engines.work("embed", inputs, {"hidden": self.hidden[0]}).run()

    def follow(self) -> None:
        """Puts the embedding of the newest answer's tokens on the stream, at the next positions.

        The device alone knows them; `moved_to` says where that is.
        """
        engines, positions = self._engines, self._positions.pointer
        named = pointer(engines.mailbox.tokens), pointer(positions)
        embed(engines.kernels, engines.weights("embed"), self.hidden[0], named, positions, steps=1)

    def is_placed(self, starts: Sequence[int]) -> bool:
        """Whether the device has these positions."""
        return list(starts) == self._starts

    def moved_to(self, starts: Sequence[int]) -> None:
        """Tells which positions the device has after what was put on the stream.

        Should that fail, nothing is lost: the tokens there are embedded again before they run.
        """
        self._starts = list(starts)

    def place(self, starts: Sequence[int]) -> None:
        """Says at which position of its sequence each row begins; what is known isn't copied."""
        if not self.is_placed(starts):
            self._engines.device.upload(self._place(starts), self._positions.pointer)

    def _place(self, starts: Sequence[int]) -> Int32:
        """Positions [rows, tokens], not uploaded yet; what follows from them is."""
        self._starts = list(starts)
        tokens = self._positions.shape[1]
        positions: Int32 = np.add.outer(
            np.array(starts, np.int32), np.arange(tokens, dtype=np.int32)
        )
        if tokens > 1:
            self._engines.device.upload(positions[:, -1].copy(), self._last.pointer)
        return positions

    def inputs(self, block: int) -> dict[str, Array]:
        """What a block takes of these tokens."""
        return {
            "hidden": self.hidden[block % 2],
            "positions": self._positions,
            "last_positions": self._last.reshape(len(self._last)),
        }

    def take(self, hidden: DeviceArray, block: int) -> None:
        """Puts hidden states where a block reads them."""
        target = self.hidden[block % 2]
        if hidden.pointer != target.pointer:
            self._engines.device.copy(hidden.pointer, target.pointer, target.nbytes)


class OnnxRuntimeCudaCache:
    """Keys and values [batch, kv_heads, capacity, head_dim] of each block, written in place.

    One-token steps are recorded once for each range of blocks and of sequences: blocks read
    positions from device memory, so that the recording serves every position.

    Args:
        engines: The opened model.
        batch_size: Sequences.
        capacity: Positions of each.

    Attributes:
        arrays: Makes arrays of hidden states.
    """

    def __init__(self, engines: OnnxRuntimeCudaEngines, batch_size: int, capacity: int) -> None:
        engines.device.make_current()
        self._engines, self._device = engines, engines.device
        self.arrays = engines.arrays
        spec = engines.spec
        self._shape = (batch_size, spec.kv_heads, capacity, spec.head_dim)
        self._values: dict[int, tuple[DeviceArray, DeviceArray]] = {}
        self._steps: dict[int, Tokens] = {}  # by sequences
        self._recorder = engines.device.recorder
        self._key = object()  # of this cache's recordings
        self._key_positions = self.arrays.upload(np.arange(capacity, dtype=np.int32))
        self._most_tokens = MOST_TOKENS
        if engines.precision == "fp32":
            most = SCORE_BYTES // (4 * spec.heads * capacity)
            self._most_tokens = max(16, min(MOST_TOKENS, most))

    def embed(self, token_ids: Int32 | Choices, starts: Sequence[int]) -> DeviceArray:
        """Embeds tokens [rows, tokens] from these positions on: [rows, tokens, H]."""
        self._device.make_current()  # the caller's thread may be another each time
        if not isinstance(token_ids, np.ndarray):
            step = self._step(len(starts))
            if self._engines.mailbox.is_newest(token_ids) and step.is_placed(
                [start - 1 for start in starts]
            ):
                self._add(("follow", len(starts)), step.follow)
                step.moved_to(starts)
                return step.hidden[0]
            token_ids = np.array(token_ids.tokens(), np.int32)[:, None]
        rows, tokens = token_ids.shape
        if tokens == 1:
            step = self._step(rows)
            step.name(token_ids, starts)
            self._add(("embed", rows), step.embed)
            return step.hidden[0]
        prompt = Tokens(self._engines, rows, tokens)
        prompt.name(token_ids, starts)
        self._recorder.flush()
        prompt.embed()
        return prompt.hidden[0]

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
        if states.shape[1] == 1:
            return self._decode(blocks, states, rows, starts, long_context)
        most = self._most_tokens
        pieces = [
            self._prefill(blocks, states[:, at : at + most], rows, starts[0] + at, long_context)
            for at in range(0, states.shape[1], most)
        ]
        return pieces[0] if len(pieces) == 1 else self.arrays.concatenate(pieces, axis=1)

    def keep(
        self, kept: DeviceArray, rows: slice, starts: Sequence[int], hidden: DeviceArray
    ) -> None:
        """Copies hidden states for later; see `backends.backend.Cache`."""
        keep(kept, rows, starts, hidden)

    def unload(self, block: int) -> None:
        """Lets go of a block's weights; its keys and values stay."""
        self._recorder.clear()
        for tokens in self._steps.values():
            tokens.works = {key: work for key, work in tokens.works.items() if key[0] != block}
        self._engines.close(block_name(block))

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self._key)

    def _step(self, rows: int) -> Tokens:
        """The buffers of steps with this many sequences, kept as recordings refer to them."""
        if rows not in self._steps:
            self._steps[rows] = Tokens(self._engines, rows, 1, lasting=True)
        return self._steps[rows]

    def _decode(
        self,
        blocks: range,
        hidden: DeviceArray,
        rows: slice,
        starts: Sequence[int],
        long_context: bool,
    ) -> DeviceArray:
        step = self._step(len(hidden))
        step.place(starts)
        step.take(hidden, blocks.start)

        def work() -> None:
            for block in blocks:
                key = (block, rows.start, long_context)
                if key not in step.works:
                    # The whole capacity, as far as the host knows: how much of it each sequence
                    # uses is in device memory.
                    step.works[key] = self._bind(block, step, rows, self._shape[2], long_context)
                step.works[key].run()

        self._add((blocks, rows.start, rows.stop, long_context), work)
        return step.hidden[blocks.stop % 2]

    def _prefill(
        self, blocks: range, hidden: DeviceArray, rows: slice, start: int, long_context: bool
    ) -> DeviceArray:
        count = hidden.shape[1]
        tokens = Tokens(self._engines, 1, count)
        tokens.place([start])
        tokens.take(hidden, blocks.start)
        self._recorder.flush()
        for block in blocks:
            self._bind(block, tokens, rows, start + count, long_context).run()
        return tokens.hidden[blocks.stop % 2]

    def _bind(
        self, block: int, tokens: Tokens, rows: slice, length: int, long_context: bool
    ) -> Work:
        """A block on these tokens.

        Args:
            block: Which block.
            tokens: Hidden states and positions.
            rows: Their sequences.
            length: Positions in use after them, at most.
            long_context: Whether LongRoPE's long factors apply.
        """
        if block not in self._values:
            dtype = DTYPES[self._engines.precision]
            self._values[block] = (self._empty(dtype), self._empty(dtype))
        key, value = (array[rows] for array in self._values[block])
        inputs: dict[str, Array] = {
            **tokens.inputs(block),
            **self._engines.rotary(long_context=long_context),
            "key_positions": self._key_positions,
            "total_length": np.array(length, np.int32),
            "past_key": key,
            "past_value": value,
        }
        outputs = {"hidden_out": tokens.hidden[1 - block % 2], "key": key, "value": value}
        return self._engines.work(block_name(block), inputs, outputs)

    def _empty(self, dtype: np.dtype) -> DeviceArray:
        """Keys or values of a block: finite where nothing was written, as all is looked at."""
        array = self.arrays.lasting(self._shape, dtype)
        self._device.clear(array.pointer, array.nbytes)
        return array

    def _add(self, key: tuple[Hashable, ...], work: Callable[[], None]) -> None:
        """Adds to the step what is the same whenever its key is."""
        self._engines.add((self._key, *key), work)
