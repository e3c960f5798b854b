"""A session: sequences, their watermarks, and the one step that everything else is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import numpy as np

from ojfa_export.backends.backend import Engines, Float32, Int32
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.watermarks import Watermarks

Exit = int | Literal["full"]


class Session:
    """Sequences in progress.

    Each block has a watermark per sequence: how many of its tokens the block has processed.
    Deeper blocks are never ahead of shallower ones. Running a block means taking the hidden states
    between its watermark and the block's before it, as one batch, and raising the watermark. A
    token that stopped at an exit waits there; when a later one goes deeper, it catches up in the
    same pass, so that whatever came before, a token that reaches the last block sees exactly the
    cache that the full model would have.

    Not thread-safe; make a session per thread.

    Args:
        spec: The model.
        engines: The opened engines.
        batch_size: Sequences.
        max_length: Tokens that a sequence may hold.
    """

    def __init__(self, spec: ModelSpec, engines: Engines, batch_size: int, max_length: int) -> None:
        self.spec = spec
        self.batch_size = batch_size
        self.max_length = max_length
        self._engines = engines
        self._cache = engines.new_cache(batch_size, max_length)
        # Plain lists: arrays of a few numbers would cost each step more than they hold.
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._watermarks = [Watermarks(spec.blocks) for _ in range(batch_size)]
        # Hidden states that came out of `depth` blocks and wait for the next: row p is position p.
        self._waiting: dict[int, Float32] = {}

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

    @overload
    def advance(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit = ...,
        *,
        every_position: Literal[False] = ...,
    ) -> Float32: ...

    @overload
    def advance(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit = ...,
        *,
        every_position: Literal[True],
    ) -> list[Float32]: ...

    def advance(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit = "full",
        *,
        every_position: bool = False,
    ) -> Float32 | list[Float32]:
        """Appends tokens and runs them through the first blocks.

        Args:
            token_ids: New tokens of the one sequence, or of each sequence; a sequence with none
                stays as it is.
            exit: Blocks to run; "full" or the number of all blocks uses the model's own head.
            every_position: Whether to give the logits of every new token, not just the last.

        Returns:
            Logits [sequences, V] float32 for the token after each sequence's last one; rows of
            sequences without new tokens are zero. With every_position, a list of [tokens, V].

        Raises:
            UsageError: An exit or a token outside the model, or no room in the cache; the session
                is unchanged.
        """
        depth = resolve_exit(exit, self.spec.blocks)
        new = self._check(token_ids)
        for row, ids in enumerate(new):
            if len(ids):
                self._resize(row, len(self._tokens[row]) + len(ids))
                self._tokens[row].extend(map(int, ids))
        return self._run([len(ids) for ids in new], depth, every_position)

    @overload
    def deepen(self, exit: Exit = ..., *, every_position: Literal[False] = ...) -> Float32: ...

    @overload
    def deepen(self, exit: Exit = ..., *, every_position: Literal[True]) -> list[Float32]: ...

    def deepen(
        self, exit: Exit = "full", *, every_position: bool = False
    ) -> Float32 | list[Float32]:
        """Runs tokens that stopped earlier through more blocks, without new tokens.

        Args:
            exit: Blocks that they shall have run.
            every_position: Whether to give the logits of every token that ran, not just the last.

        Returns:
            As `advance`; rows of sequences in which nothing waited are zero or empty.

        Raises:
            UsageError: An exit outside the model.
        """
        depth = resolve_exit(exit, self.spec.blocks)
        rows = zip(self._tokens, self._watermarks, strict=True)
        waiting = [len(tokens) - marks[depth - 1] for tokens, marks in rows]
        return self._run(waiting, depth, every_position)

    def _run(self, counts: list[int], depth: int, every_position: bool) -> Float32 | list[Float32]:
        """Runs the first blocks and a head; logits of each sequence's last `counts` tokens."""
        vocab = self.spec.vocab_size
        final = depth == self.spec.blocks
        per_row: list[Float32] = [np.zeros((0, vocab), np.float32)] * self.batch_size
        logits: Float32 | None = None
        for rows in self._groups(counts, depth):
            hidden = self._deepen(rows, depth)
            if every_position:
                for row, states in zip(range(rows.start, rows.stop), hidden, strict=True):
                    wanted = np.ascontiguousarray(states[-counts[row] :])
                    per_row[row] = self._engines.logits(wanted, final=final)
            else:
                newest = hidden if hidden.shape[1] == 1 else hidden[:, -1:].copy()
                result = self._engines.logits(newest.reshape(len(hidden), -1), final=final)
                if len(result) == self.batch_size:
                    return result
                if logits is None:
                    logits = np.zeros((self.batch_size, vocab), np.float32)
                logits[rows] = result
        if every_position:
            return per_row
        return np.zeros((self.batch_size, vocab), np.float32) if logits is None else logits

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

    def _check(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
        nested = len(token_ids) > 0 and not isinstance(token_ids[0], int | np.integer)
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
        switch = self.spec.rotary_switch
        if switch is not None and (length > switch) != self._long_context(row):
            self._watermarks[row].lower_to(0)
        elif length < len(self._tokens[row]):
            self._watermarks[row].lower_to(length)

    def _long_context(self, row: int) -> bool:
        switch = self.spec.rotary_switch
        return switch is not None and len(self._tokens[row]) > switch

    def _groups(self, counts: list[int], depth: int) -> Iterator[slice]:
        """Sequences that can run together: neighbours with exactly one token to run everywhere."""
        start = 0
        while start < self.batch_size:
            stop = start + 1
            if counts[start] and self._is_one_token(start, depth):
                long = self._long_context(start)
                while (
                    stop < self.batch_size
                    and counts[stop]
                    and self._is_one_token(stop, depth)
                    and self._long_context(stop) == long
                ):
                    stop += 1
            if counts[start]:
                yield slice(start, stop)
            start = stop

    def _is_one_token(self, row: int, depth: int) -> bool:
        return self._watermarks[row].all_at(len(self._tokens[row]) - 1, depth)

    def _deepen(self, rows: slice, depth: int) -> Float32:
        """Runs the first blocks on all that waits before them.

        Args:
            rows: One sequence, or several that have exactly one token to run everywhere.
            depth: Blocks to run.

        Returns:
            Hidden states [rows, tokens, H] of the newest tokens after `depth` blocks.
        """
        marks, end = self._watermarks[rows.start], len(self._tokens[rows.start])
        starts = [marks[0] for marks in self._watermarks[rows]]
        long = self._long_context(rows.start)
        hidden = self._embed(rows, starts)  # none, where only tokens that wait are to run
        for blocks, start in marks.spans(depth):
            covered = end - hidden.shape[1]
            if start < covered:
                waiting = self._waiting[blocks.start][rows, start:covered]
                hidden = np.concatenate([waiting, hidden], axis=1)
                starts = [start]
            if hidden.shape[1]:
                hidden = self._cache.run_blocks(blocks, hidden, rows, starts, long_context=long)
        if depth < self.spec.blocks:
            self._wait(depth, rows, starts, hidden)
        # Raised together, when all is done: a pass that is interrupted can be run again.
        for tokens, each in zip(self._tokens[rows], self._watermarks[rows], strict=True):
            each.raise_to(len(tokens), depth)
        return hidden

    def _embed(self, rows: slice, starts: list[int]) -> Float32:
        new = [tokens[start:] for tokens, start in zip(self._tokens[rows], starts, strict=True)]
        return self._cache.embed(np.array(new, np.int32), starts)

    def _wait(self, depth: int, rows: slice, starts: list[int], hidden: Float32) -> None:
        """Keeps hidden states for a later pass that goes deeper."""
        if depth not in self._waiting:
            shape = (self.batch_size, self.max_length, self.spec.hidden_size)
            self._waiting[depth] = np.empty(shape, np.float32)
        for row, start, states in zip(range(rows.start, rows.stop), starts, hidden, strict=True):
            self._waiting[depth][row, start : start + len(states)] = states


def resolve_exit(exit: Exit, blocks: int) -> int:
    """Blocks to run for an exit.

    Raises:
        UsageError: Not "full" or a number from 1 to the number of blocks.
    """
    if exit == "full":
        return blocks
    if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= blocks:
        raise UsageError(
            f"exit {exit!r} is outside this model's 1..{blocks}",
            hint=f"exits count blocks run: a number from 1 to {blocks}, or 'full'",
        )
    return exit
