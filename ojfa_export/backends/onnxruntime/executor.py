"""Ragged passes on ONNX Runtime's CPU provider.

Matrix products run on the tokens of a pass packed together; only attention sees a row for each
slot of the cache, padded to the longest chunk, in which slots without tokens cost next to nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue, RunOptions

from ojfa_export.backends.onnxruntime.opened import OpenedModel
from ojfa_export.backends.onnxruntime.session import failure
from ojfa_export.backends.onnxruntime.slots import SlotArray
from ojfa_export.backends.passes import (
    Chunk,
    as_rows,
    load_chunks,
    positions_of,
    row_ranges,
    rows_of,
    split_pass,
    store_chunks,
)
from ojfa_export.decoding.arrays import Float32
from ojfa_export.system.heap import trim_heap

# Attention scores of a prefill are held for one piece of the prompt at a time: at most this
# many bytes, and no more tokens than make products fast. A piece doesn't see the tokens after it,
# so that smaller ones do less work as well (bench/NOTES.md).
SCORE_BYTES, PIECE = 64 << 20, 256
# Chunks of up to so many tokens always run together: decode steps, and drafts that are verified.
SHORT_CHUNK = 8
# Longer chunks, of prompts, do so in attention padded to the longest of them, up to so many tokens
# of each and so many rows with padding (bench/NOTES.md).
LONGEST_CHUNK, PADDED_ROWS = 64, 2048
# Room for their scores, most of it padding that is never touched: at most this many bytes.
PADDED_SCORE_BYTES = 256 << 20
# Shapes of passes whose bindings are kept, those that were used last.
MOST_SHAPES = 64

# What a long prompt's scores took, tens of megabytes, is given back when it has run: steps after it
# need next to nothing.
GIVING_BACK = RunOptions()
GIVING_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

Run = Callable[[RunOptions | None], None]
# What a block takes beside hidden states, by name: a row for each token.
Beside = Mapping[str, NDArray[np.int32]]
NOTHING: Beside = {}
value_of = OrtValue.ortvalue_from_numpy  # no copy: it keeps the array


class OnnxRuntimeExecutor:
    """Keys and values [slots, kv_heads, capacity, head_dim] of each block, written in place.

    Args:
        model: The opened model.
        slots: Sequences.
        capacity: Positions of each.
    """

    arrays: Any = np

    def __init__(self, model: OpenedModel, slots: int, capacity: int) -> None:
        spec = model.spec
        self.model = model
        self.slots, self.capacity = slots, capacity
        scores = PADDED_SCORE_BYTES // (4 * spec.heads * capacity * slots)
        self._longest = max(SHORT_CHUNK, min(LONGEST_CHUNK, PADDED_ROWS // slots, scores))
        # A chunk is padded to the longest of its pass, and the padding needs room as well.
        self._shape = (slots, spec.kv_heads, capacity + self._longest - 1, spec.head_dim)
        self._cache: dict[int, tuple[SlotArray, SlotArray]] = {}
        self._states: list[SlotArray] = []
        self._batches: OrderedDict[tuple[int, int, bool], Batch] = OrderedDict()
        self._prefill_tokens = min(PIECE, max(16, SCORE_BYTES // (4 * spec.heads * capacity)))

    def embed(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> Float32:
        """Embeds the tokens of chunks: [tokens, H]."""
        feeds = {"token_ids": as_rows(tokens)}
        if self.model.spec.learned_positions:
            feeds["positions"] = as_rows(positions_of(chunks))
        hidden: Float32 = self.model.session("embed").run(None, feeds)[0]
        return hidden.reshape(len(tokens), -1)

    def run(
        self,
        blocks: range,
        hidden: Float32,
        chunks: Sequence[Chunk],
        *,
        long_context: bool,
        beside: Beside = NOTHING,
    ) -> Float32:
        """Runs consecutive blocks on new tokens; see `backends.backend.Executor`.

        Args:
            blocks: As there.
            hidden: As there.
            chunks: As there.
            long_context: As there.
            beside: What a draft layer takes beside hidden states.
        """
        parts = split_pass(chunks, self._longest)
        if len(parts) == 1:
            return self._run_part(blocks, hidden, chunks, long_context, beside)
        ranges, result = row_ranges(chunks), np.empty_like(hidden)
        for part in parts:
            rows = rows_of(ranges, part)
            some = [chunks[index] for index in part]
            result[rows] = self._run_part(
                blocks, hidden[rows], some, long_context, rows_beside(beside, rows)
            )
        return result

    def new_states(self) -> Float32:
        """Room for a hidden state of every position; untouched memory until it is used."""
        states = SlotArray((self.slots, self.capacity, self.model.spec.hidden_size))
        self._states.append(states)
        return states.array

    def store(self, states: Float32, chunks: Sequence[Chunk], hidden: Float32) -> None:
        """Copies hidden states to their places; see `backends.backend.Executor`."""
        store_chunks(states, chunks, hidden)

    def load(self, states: Float32, chunks: Sequence[Chunk]) -> Float32:
        """Hidden states [tokens, H] that were stored."""
        hidden: Float32 = load_chunks(np, states, chunks)
        return hidden

    def unload(self, block: int) -> None:
        """Closes a block's session; its keys and values stay."""
        for batch in self._batches.values():
            batch.unbind(block)
        self.model.close(self.model.graph_of(block))

    def release(self, slot: int) -> None:
        """Gives a slot's pages back to the operating system."""
        for each in (*self._states, *(part for both in self._cache.values() for part in both)):
            each.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies keys and values of a slot's first tokens to another; see `Executor`."""
        for both in self._cache.values():
            for part in both:
                part.array[target, :, :count] = part.array[source, :, :count]

    def cache(self, block: int) -> tuple[Float32, Float32]:
        """Keys and values of a block, [slots, kv_heads, positions, head_dim]."""
        if block not in self._cache:
            self._cache[block] = SlotArray(self._shape), SlotArray(self._shape)
        keys, values = self._cache[block]
        return keys.array, values.array

    def _run_part(
        self,
        blocks: range,
        hidden: Float32,
        chunks: Sequence[Chunk],
        long_context: bool,
        beside: Beside,
    ) -> Float32:
        tokens, length = len(hidden), max(chunk.length for chunk in chunks)
        if len(chunks) == 1 and length > SHORT_CHUNK:
            return self._prefill(blocks, hidden, chunks[0], long_context, beside)
        batch = self._batches.get((tokens, length, long_context))
        if batch is None:
            batch = Batch(self, slice(0, self.slots), tokens, length, long_context, beside)
            if len(self._batches) >= MOST_SHAPES:
                self._batches.popitem(last=False)
            self._batches[tokens, length, long_context] = batch
        else:
            self._batches.move_to_end((tokens, length, long_context))
        batch.place(chunks)
        return batch.run(blocks, hidden, beside)

    def _prefill(
        self,
        blocks: range,
        hidden: Float32,
        chunk: Chunk,
        long_context: bool,
        beside: Beside,
    ) -> Float32:
        """Runs many tokens of one sequence, a piece at a time."""
        slot, start, count = chunk
        pieces = [
            Chunk(slot, start + at, min(self._prefill_tokens, count - at))
            for at in range(0, count, self._prefill_tokens)
        ]
        if len(pieces) == 1:
            return self._batch(pieces[0], long_context, beside).run(blocks, hidden, beside)
        hidden = self._run_pieces(blocks, hidden, pieces, long_context, beside)
        trim_heap()
        return hidden

    def _run_pieces(
        self,
        blocks: range,
        hidden: Float32,
        pieces: Sequence[Chunk],
        long_context: bool,
        beside: Beside,
    ) -> Float32:
        """Runs block after block on all pieces; in the end scratch memory is given back."""
        batches = [self._batch(piece, long_context, beside) for piece in pieces]
        for block in blocks:
            result, at = np.empty_like(hidden), 0
            for piece, batch in zip(pieces, batches, strict=True):
                rows = slice(at, at + piece.length)
                last = block == blocks[-1] and batch is batches[-1]
                result[rows] = batch.run(
                    range(block, block + 1),
                    hidden[rows],
                    rows_beside(beside, rows),
                    GIVING_BACK if last else None,
                )
                at += piece.length
            hidden = result
        return hidden

    def _batch(self, piece: Chunk, long_context: bool, beside: Beside) -> Batch:
        """A pass of one piece of a prompt."""
        one = slice(piece.slot, piece.slot + 1)
        batch = Batch(self, one, piece.length, piece.length, long_context, beside)
        batch.place([piece])
        return batch


class Batch:
    """Passes of one shape: buffers that blocks are bound to once.

    All that changes from pass to pass is what lies in them; hidden states go back and forth between
    two. Little is done per block, as this is the path of every token.

    Args:
        executor: Whose cache.
        slots: Neighbours in the cache.
        tokens: Of all sequences together.
        length: Of the longest chunk.
        long_context: Whether LongRoPE's long factors apply.
        beside: What blocks take beside hidden states; its names count.
    """

    def __init__(
        self,
        executor: OnnxRuntimeExecutor,
        slots: slice,
        tokens: int,
        length: int,
        long_context: bool,
        beside: Beside,
    ) -> None:
        count = slots.stop - slots.start
        self._executor, self._slots = executor, slots
        width = executor.model.spec.hidden_size
        self._hidden = tuple(np.empty((tokens, width), np.float32) for _ in range(2))
        self._inputs: dict[str, Any] = {
            "last_positions": np.zeros(count, np.int32),
            "total_length": np.zeros((), np.int32),
            "query_lengths": np.zeros(count, np.int32),
            "unpack": np.zeros((count, length), np.int64),
            "pack": np.zeros(tokens, np.int64),
            **{name: np.zeros(tokens, array.dtype) for name, array in beside.items()},
        }
        # The same memory as ONNX Runtime's values, made once for all blocks.
        tables = executor.model.rotary_tables(long_context=long_context)
        self._values = {name: value_of(array) for name, array in (self._inputs | tables).items()}
        self._hidden_values = tuple(map(value_of, self._hidden))
        self._shape: list[tuple[int, int]] | None = None
        self._runs: dict[int, Run] = {}

    def place(self, chunks: Sequence[Chunk]) -> None:
        """Says whose tokens they are, and where."""
        first, inputs = self._slots.start, self._inputs
        shape = [(chunk.slot, chunk.length) for chunk in chunks]
        if shape != self._shape:
            self._shape = None  # until all of it is known
            lengths, unpack, pack = (inputs[n] for n in ("query_lengths", "unpack", "pack"))
            inputs["last_positions"][...] = lengths[...] = unpack[...] = 0
            for (slot, _, count), rows in zip(chunks, row_ranges(chunks), strict=True):
                lengths[slot - first] = count
                unpack[slot - first, :count] = rows
                at = (slot - first) * unpack.shape[1]
                pack[rows.start : rows.stop] = range(at, at + count)
            self._shape = shape
        last = inputs["last_positions"]
        for slot, start, count in chunks:
            last[slot - first] = start + count - 1
        inputs["total_length"][...] = max(start + count for _, start, count in chunks)

    def run(
        self, blocks: range, hidden: Float32, beside: Beside, options: RunOptions | None = None
    ) -> Float32:
        """Runs consecutive blocks on hidden states [tokens, H]."""
        self._hidden[blocks.start % 2][...] = hidden
        for name, array in beside.items():
            self._inputs[name][...] = array
        for block in blocks:
            if block not in self._runs:
                self._runs[block] = self._bind(block)
            self._runs[block](options)
        return self._hidden[blocks.stop % 2]

    def unbind(self, block: int) -> None:
        """Drops the binding to a block's session."""
        self._runs.pop(block, None)

    def _bind(self, block: int) -> Run:
        """Binds a block's inputs and outputs to memory; past and present are the same memory."""
        model = self._executor.model
        name_of_graph = model.graph_of(block)
        session = model.session(name_of_graph)
        keys, values = (value_of(part[self._slots]) for part in self._executor.cache(block))
        source, target = self._hidden_values[block % 2], self._hidden_values[1 - block % 2]
        binding = session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in (("hidden", source), ("past_key", keys), ("past_value", values)):
            binding.bind_ortvalue_input(name, value)
        for name, value in (("hidden_out", target), ("key", keys), ("value", values)):
            binding.bind_ortvalue_output(name, value)

        def run(options: RunOptions | None) -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:  # onnxruntime's exceptions share no base class but this
                raise failure(name_of_graph, error) from error

        return run


def rows_beside(beside: Beside, rows: slice | list[int]) -> Beside:
    """Some rows of what blocks take beside hidden states."""
    return {name: array[rows] for name, array in beside.items()}
