"""Running blocks on ONNX Runtime's CUDA provider: nothing but positions goes to the GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

import numpy as np

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.cuda.embedding import embed
from ojfa_export.backends.cuda.kernels import pointer
from ojfa_export.backends.onnxruntime_cuda.opened import OpenedModel
from ojfa_export.backends.onnxruntime_cuda.provider import Array, Work
from ojfa_export.backends.passes import (
    Chunk,
    as_rows,
    load_chunks,
    positions_of,
    row_ranges,
    rows_of,
    store_chunks,
    write_rows,
)
from ojfa_export.bundle.names import block_name
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.decoding.head_output import HeadOutput

# Tokens of a prompt that run at once; and with fp32's attention, bytes of their scores.
MOST_TOKENS = 1024
SCORE_BYTES = 256 << 20


class Tokens:
    """Buffers of a pass over some tokens: one of each of several sequences, or many of one.

    Args:
        model: The opened model.
        rows: Sequences.
        tokens: Of each.
        lasting: Whether recordings refer to them.

    Attributes:
        hidden: Two buffers [rows, tokens, H] fp32; block i reads the (i % 2)th and writes the
            other.
    """

    def __init__(
        self, model: OpenedModel, rows: int, tokens: int, *, lasting: bool = False
    ) -> None:
        spec = model.spec
        self._model = model
        new = model.arrays.lasting if lasting else model.arrays.empty
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
        self._model.device.upload(np.stack([token_ids, positions]), self._described.pointer)

    def embed(self) -> None:
        """Puts the embedding on the stream, into the first buffer."""
        self._embed(self._ids.pointer, steps=0)

    def follow(self) -> None:
        """Puts the embedding of the newest answer's tokens on the stream, at the next positions.

        The device alone knows them; `moved_to` says where that is.
        """
        self._embed(self._model.mailbox.tokens, steps=1)

    def _embed(self, ids: int, steps: int) -> None:
        model, positions = self._model, self._positions.pointer
        embed(
            model.kernels,
            model.weights("embed"),
            self.hidden[0],
            (pointer(ids), pointer(positions)),
            positions,
            steps,
            model.mailbox.chosen,
        )

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
            self._model.device.upload(self._place(starts), self._positions.pointer)

    def _place(self, starts: Sequence[int]) -> Int32:
        """Positions [rows, tokens], not uploaded yet; what follows from them is."""
        self._starts = list(starts)
        tokens = self._positions.shape[1]
        positions: Int32 = np.add.outer(
            np.array(starts, np.int32), np.arange(tokens, dtype=np.int32)
        )
        if tokens > 1:
            self._model.device.upload(positions[:, -1].copy(), self._last.pointer)
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
            self._model.device.copy(hidden.pointer, target.pointer, target.nbytes)


class OnnxRuntimeCudaExecutor:
    """Keys and values [slots, kv_heads, capacity, head_dim] of each block, written in place.

    Passes of one token each of neighbouring slots are recorded once for each range of blocks and of
    slots: blocks read positions from device memory, so that the recording serves every position.

    Args:
        model: The opened model.
        slots: Sequences.
        capacity: Positions of each.

    Attributes:
        arrays: Makes arrays of hidden states.
    """

    def __init__(self, model: OpenedModel, slots: int, capacity: int) -> None:
        model.device.make_current()
        self._model, self._device = model, model.device
        self.arrays = model.arrays
        spec = model.spec
        self._shape = (slots, spec.kv_heads, capacity, spec.head_dim)
        self._values: dict[int, tuple[DeviceArray, DeviceArray]] = {}
        self._steps: dict[int, Tokens] = {}  # by sequences
        self._recorder = model.device.recorder
        self._key = object()  # of this executor's recordings
        self._key_positions = self.arrays.upload(np.arange(capacity, dtype=np.int32))
        self._most_tokens = MOST_TOKENS
        if model.precision == "fp32":
            most = SCORE_BYTES // (4 * spec.heads * capacity)
            self._most_tokens = max(16, min(MOST_TOKENS, most))

    def embed(self, tokens: Sequence[int] | HeadOutput, chunks: Sequence[Chunk]) -> DeviceArray:
        """Embeds the tokens of chunks: [tokens, H]."""
        self._device.make_current()  # the caller's thread may be another each time
        positions = positions_of(chunks)
        count = len(positions)
        if not isinstance(tokens, list):
            step = self._step(count)
            if self._model.mailbox.is_newest(tokens) and step.is_placed(
                [position - 1 for position in positions]
            ):
                self._add(("follow", count), step.follow)
                step.moved_to(positions)
                return _rows(step.hidden[0])
            tokens = tokens.tokens()  # type: ignore[union-attr]
        if len(chunks) == count:
            step = self._step(count)
            step.name(as_rows(tokens), positions)
            self._add(("embed", count), step.embed)
            return _rows(step.hidden[0])
        some = Tokens(self._model, count, 1)
        some.name(as_rows(tokens), positions)
        self._recorder.flush()
        some.embed()
        return _rows(some.hidden[0])

    def run(
        self,
        blocks: range,
        hidden: Float32 | DeviceArray,
        chunks: Sequence[Chunk],
        *,
        long_context: bool,
    ) -> DeviceArray:
        """Runs consecutive blocks on new tokens; see `backends.backend.Executor`."""
        self._device.make_current()
        states = self.arrays.asarray(hidden)
        parts = _split(chunks)
        if len(parts) == 1:
            return self._run_part(blocks, states, chunks, long_context)
        ranges, result = row_ranges(chunks), self.arrays.empty(states.shape, np.float32)
        for part in parts:
            rows = rows_of(ranges, part)
            some = [chunks[index] for index in part]
            write_rows(result, rows, self._run_part(blocks, states[rows], some, long_context))
        return result

    def _run_part(
        self, blocks: range, states: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        if len(chunks) == len(states):
            return self._decode(blocks, states, chunks, long_context)
        [(slot, start, count)] = chunks
        most = self._most_tokens
        pieces = [
            self._prefill(blocks, states[at : at + most], slot, start + at, long_context)
            for at in range(0, count, most)
        ]
        return pieces[0] if len(pieces) == 1 else self.arrays.concatenate(pieces)

    def new_states(self) -> DeviceArray:
        """Room for a hidden state of every position; see `backends.backend.Executor`."""
        slots, _, capacity, _ = self._shape
        return self.arrays.empty((slots, capacity, self._model.spec.hidden_size), np.float32)

    def store(self, states: DeviceArray, chunks: Sequence[Chunk], hidden: DeviceArray) -> None:
        """Copies hidden states to their places; see `backends.backend.Executor`."""
        store_chunks(states, chunks, hidden)

    def load(self, states: DeviceArray, chunks: Sequence[Chunk]) -> DeviceArray:
        """Hidden states [tokens, H] that were stored."""
        hidden: DeviceArray = load_chunks(self.arrays, states, chunks)
        return hidden

    def release(self, slot: int) -> None:
        """Nothing: the cache is one allocation, which the next sequence writes over."""

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies keys and values of a slot's first tokens to another; see `Executor`."""
        for both in self._values.values():
            for array in both:
                for head in range(self._shape[1]):
                    array[target, head, :count] = array[source, head, :count]

    def unload(self, block: int) -> None:
        """Lets go of a block's weights; its keys and values stay."""
        self._recorder.clear()
        for tokens in self._steps.values():
            tokens.works = {key: work for key, work in tokens.works.items() if key[0] != block}
        self._model.close(self._graph_of(block))

    def _graph_of(self, block: int) -> str:
        """The name of a block's graph."""
        return block_name(block)

    def _beside(self, block: int, tokens: Tokens) -> dict[str, Array]:
        """What a block takes beside what all blocks take."""
        return {}

    def __del__(self) -> None:
        with suppress(Exception):
            self._recorder.forget(self._key)

    def _step(self, rows: int) -> Tokens:
        """The buffers of steps with this many sequences, kept as recordings refer to them."""
        if rows not in self._steps:
            self._steps[rows] = Tokens(self._model, rows, 1, lasting=True)
        return self._steps[rows]

    def _decode(
        self, blocks: range, hidden: DeviceArray, chunks: Sequence[Chunk], long_context: bool
    ) -> DeviceArray:
        rows = slice(chunks[0].slot, chunks[-1].slot + 1)
        step = self._step(len(chunks))
        step.place([chunk.start for chunk in chunks])
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
        return _rows(step.hidden[blocks.stop % 2])

    def _prefill(
        self, blocks: range, hidden: DeviceArray, slot: int, start: int, long_context: bool
    ) -> DeviceArray:
        count = len(hidden)
        tokens = Tokens(self._model, 1, count)
        tokens.place([start])
        tokens.take(hidden, blocks.start)
        self._recorder.flush()
        rows = slice(slot, slot + 1)
        for block in blocks:
            self._bind(block, tokens, rows, start + count, long_context).run()
        return _rows(tokens.hidden[blocks.stop % 2])

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
            dtype = DTYPES[self._model.precision]
            self._values[block] = (self._empty(dtype), self._empty(dtype))
        key, value = (array[rows] for array in self._values[block])
        inputs: dict[str, Array] = {
            **tokens.inputs(block),
            **self._model.rotary(long_context=long_context),
            "key_positions": self._key_positions,
            "total_length": np.array(length, np.int32),
            "past_key": key,
            "past_value": value,
            **self._beside(block, tokens),
        }
        outputs = {"hidden_out": tokens.hidden[1 - block % 2], "key": key, "value": value}
        return self._model.work(self._graph_of(block), inputs, outputs)

    def _empty(self, dtype: np.dtype) -> DeviceArray:
        """Keys or values of a block: finite where nothing was written, as all is looked at."""
        array = self.arrays.lasting(self._shape, dtype)
        self._device.clear(array.pointer, array.nbytes)
        return array

    def _add(self, key: tuple[Hashable, ...], work: Callable[[], None]) -> None:
        """Adds to the step what is the same whenever its key is."""
        self._model.add((self._key, *key), work)


def _rows(hidden: DeviceArray) -> DeviceArray:
    """Hidden states [rows, tokens, H] as [rows * tokens, H]."""
    rows, tokens, width = hidden.shape
    return hidden.reshape(rows * tokens, width)


def _split(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Which chunks run together: one token each, of neighbouring slots; others alone."""
    parts: list[list[int]] = []
    for index, chunk in enumerate(chunks):
        before = chunks[index - 1]
        joins = index and chunk.length == before.length == 1 and chunk.slot == before.slot + 1
        if joins:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts
