"""Sequences and their watermarks, and the one pass that everything else is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ojfa_export.backends.backend import Engines, Hidden, Int32
from ojfa_export.backends.choice import Choices, OneToken
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.watermarks import Watermarks

# Depth, sequences, positions of their first tokens, and hidden states [rows, tokens, H].
NewestPass = tuple[int, slice, list[int], Hidden]


class Sequences:
    """Tokens of some sequences, and how many of them each block has processed.

    Each block has a watermark per sequence: how many of its tokens the block has processed.
    Deeper blocks are never ahead of shallower ones. Running a block means taking the hidden states
    between its watermark and the block's before it, as one batch, and raising the watermark. A
    token that stopped at an exit waits there; when a later one goes deeper, it catches up in the
    same pass, so that whatever came before, a token that reaches the last block sees exactly the
    cache that the full model would have.

    Args:
        spec: The model.
        engines: The opened engines.
        batch_size: Sequences.
        max_length: Tokens that a sequence may hold.
        keep_final: Whether to keep the hidden states that come out of the last block.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        batch_size: int,
        max_length: int,
        *,
        keep_final: bool = False,
    ) -> None:
        self.spec = spec
        self.batch_size = batch_size
        self.max_length = max_length
        self._cache = engines.new_cache(batch_size, max_length)
        # Plain lists: arrays of a few numbers would cost each step more than they hold.
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._watermarks = [Watermarks(spec.blocks) for _ in range(batch_size)]
        # Hidden states that came out of `depth` blocks and wait for the next: row p is position p.
        self._waiting: dict[int, Hidden] = {}
        # The same of the last block, for which nothing waits.
        self._final = self._new_states() if keep_final else None
        # What the newest pass gave, where no other came since.
        self._newest_pass: NewestPass | None = None
        # What chooses the newest tokens, in a pass that begins before they are known.
        self._following: Choices | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(tokens) for tokens in self._tokens]

    @property
    def watermarks(self) -> Int32:
        """Tokens that each block has processed, [blocks, sequences]."""
        marks = [[row[block] for row in self._watermarks] for block in range(self.spec.blocks)]
        return np.array(marks, np.int32)

    def tokens(self, row: int = 0) -> list[int]:
        """Token ids of a sequence so far."""
        return list(self._tokens[row])

    def rewind(self, length: int, row: int = 0) -> None:
        """Drops the tokens after the first `length`: a change of numbers, nothing is computed.

        Raises:
            UsageError: A row that isn't there, or more tokens than it has.
        """
        if not 0 <= row < self.batch_size:
            raise UsageError(f"row {row} is outside 0..{self.batch_size - 1}")
        if not 0 <= length <= len(self._tokens[row]):
            raise UsageError(
                f"can't rewind to {length} tokens: the sequence has {len(self._tokens[row])}",
                hint="rewind only shortens a sequence",
            )
        self._resize(row, length)
        del self._tokens[row][length:]

    def _append(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[int]:
        """Takes new tokens, which then wait before the first block; how many of each sequence."""
        new = self._check(token_ids)
        for row, ids in enumerate(new):
            if len(ids):
                self._resize(row, len(self._tokens[row]) + len(ids))
                self._tokens[row].extend(map(int, ids))
        return [len(ids) for ids in new]

    def _check(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
        nested = len(token_ids) > 0 and not isinstance(token_ids[0], (int, np.integer))
        new: list[Sequence[int]] = list(token_ids) if nested else [token_ids]  # type: ignore[arg-type, list-item]
        if len(new) != self.batch_size:
            raise UsageError(
                f"got tokens for {len(new)} sequences, the session has {self.batch_size}",
                hint="give one list of token ids per sequence",
            )
        for row, ids in enumerate(new):
            length = len(self._tokens[row]) + len(ids)
            if length > self.max_length:
                raise UsageError(
                    f"sequence {row} would have {length} tokens, the cache holds {self.max_length}",
                    hint="shorten it, or build the bundle with a larger --max-cache-length",
                )
            if len(ids) and not 0 <= min(ids) <= max(ids) < self.spec.vocab_size:
                raise UsageError(
                    f"sequence {row} has token ids outside 0..{self.spec.vocab_size - 1}",
                    hint="was the text encoded with another model's tokenizer?",
                )
        return new

    def _resize(self, row: int, length: int) -> None:
        """Makes the marks fit a sequence's new length.

        LongRoPE rotates every position by the sequence's length class: a change starts over.
        """
        self._newest_pass = None
        switch = self.spec.rotary_switch
        if switch is not None and (length > switch) != self._long_context(row):
            self._watermarks[row].lower_to(0)
        elif length < len(self._tokens[row]):
            self._watermarks[row].lower_to(length)

    def _long_context(self, row: int) -> bool:
        switch = self.spec.rotary_switch
        return switch is not None and len(self._tokens[row]) > switch

    def _groups(self, wanted: Sequence[bool], depth: int) -> Iterator[slice]:
        """Sequences that can run together: those whose one token waits before the same block.

        Rows must be neighbours in the cache. One between them that stopped earlier runs along, as
        that costs less than another pass: it computes something at a position that no block from
        there on has processed, and what it writes is overwritten before it is read.
        """
        if self.batch_size == 1:
            if wanted[0]:
                yield slice(0, 1)
            return
        start = 0
        while start < self.batch_size:
            stop = start + 1
            entry = self._entry(start, depth) if wanted[start] else None
            if entry is not None:
                long = self._long_context(start)
                for row in range(start + 1, self.batch_size):
                    none_waits = self._watermarks[row][entry] == len(self._tokens[row])
                    if none_waits or self._long_context(row) != long:
                        break
                    if wanted[row]:
                        if self._entry(row, depth) != entry:
                            break
                        stop = row + 1
            if wanted[start]:
                yield slice(start, stop)
            start = stop

    def _entry(self, row: int, depth: int) -> int | None:
        """The block before which a sequence's one token waits; None where it has more to run."""
        length, marks = len(self._tokens[row]), self._watermarks[row]
        if marks.end(0, length - 1) >= depth:
            return 0
        spans = list(marks.spans(depth))
        if [mark for _, mark in spans] == [length, length - 1]:
            return spans[1][0].start
        return None

    def _deepen(self, rows: slice, depth: int, wanted: Sequence[bool]) -> Hidden:
        """Runs the first blocks on all that waits before them.

        Args:
            rows: One sequence, or several: see `_groups`.
            depth: Blocks to run.
            wanted: [sequences] those of which the result counts.

        Returns:
            Hidden states [rows, tokens, H] of the newest tokens after `depth` blocks.
        """
        newest, self._newest_pass = self._newest_pass, None  # an interrupted pass leaves none
        marks, end = self._watermarks[rows.start], len(self._tokens[rows.start])
        starts = [marks[0] for marks in self._watermarks[rows]]
        long = self._long_context(rows.start)
        hidden = self._embed(rows, starts)
        if hidden.shape[1]:
            newest = None
        for blocks, start in marks.spans(depth):
            covered = end - hidden.shape[1]
            if start < covered:
                starts = [each[blocks.start] for each in self._watermarks[rows]]
                waiting = self._waited(blocks.start, rows, starts, covered - start, newest)
                join = self._cache.arrays.concatenate
                hidden = join([waiting, hidden], axis=1) if hidden.shape[1] else waiting
            if hidden.shape[1]:
                hidden = self._cache.run_blocks(blocks, hidden, rows, starts, long_context=long)
        if (kept := self._kept(depth)) is not None:
            self._cache.keep(kept, rows, starts, hidden)
        # Raised together, when all is done: a pass that is interrupted can be run again.
        for row in range(rows.start, rows.stop):
            if wanted[row]:
                self._watermarks[row].raise_to(len(self._tokens[row]), depth)
        if hidden.shape[1]:
            self._newest_pass = depth, rows, starts, hidden
        return hidden

    def _one_each(self) -> OneToken | None:
        """Each sequence's newest token, if that is all of it that waits before the first block."""
        starts, clear, long = [], self.spec.blocks, self._long_context(0)
        for row, tokens in enumerate(self._tokens):
            starts.append(len(tokens) - 1)
            clear = min(clear, self._watermarks[row].end(0, starts[row]))
            if self._long_context(row) != long:
                return None
        if not clear:
            return None
        new = self._following or [tokens[-1] for tokens in self._tokens]
        return OneToken(slice(0, self.batch_size), starts, new, long, clear=clear)

    def _keeps(self, depth: int) -> bool:
        """Whether there is room already for what is kept after so many blocks."""
        return depth == self.spec.blocks or depth in self._waiting

    def _kept(self, depth: int) -> Hidden | None:
        """Where hidden states after so many blocks are kept, if they are."""
        if depth == self.spec.blocks:
            return self._final
        kept = self._waiting.get(depth)
        if kept is None:
            kept = self._waiting[depth] = self._new_states()
        return kept

    def _embed(self, rows: slice, starts: list[int]) -> Hidden:
        """Embeds what waits before the first block: nothing, where tokens wait only later."""
        count = len(self._tokens[rows.start]) - starts[0]
        if not count:
            return self._cache.arrays.empty((len(starts), 0, self.spec.hidden_size), np.float32)
        if self._following is not None:
            return self._cache.embed(self._following, starts)
        both = zip(self._tokens[rows], starts, strict=True)
        new = [tokens[start : start + count] for tokens, start in both]
        return self._cache.embed(np.array(new, np.int32), starts)

    def _waited(
        self, depth: int, rows: slice, starts: list[int], count: int, newest: NewestPass | None
    ) -> Hidden:
        """Hidden states that wait before a block, [rows, count, H]; count 1 for several rows."""
        if newest is not None and newest[:3] == (depth, rows, starts):
            hidden = newest[3]
            if hidden.shape[1] == count:
                return hidden  # still where it was computed
        waiting = self._waiting[depth]
        return self._cache.arrays.stack(
            [waiting[rows.start + i, at : at + count] for i, at in enumerate(starts)]
        )

    def _new_states(self) -> Hidden:
        """Room for the hidden states of every position; untouched memory until it is used."""
        shape = (self.batch_size, self.max_length, self.spec.hidden_size)
        return self._cache.arrays.empty(shape, np.float32)
