"""A session: sequences, their watermarks, and the one step that everything else is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import numpy as np

from ojfa_export.backends.backend import Engines, Float32, Int32
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec

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
        self._tokens = np.zeros((batch_size, max_length), np.int32)
        self._lengths = np.zeros(batch_size, np.int32)
        self._watermarks = np.zeros((spec.blocks, batch_size), np.int32)
        # Hidden states that came out of `depth` blocks and wait for the next: row p is position p.
        self._waiting: dict[int, Float32] = {}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(length) for length in self._lengths]

    @property
    def watermarks(self) -> Int32:
        """Tokens that each block has processed, [blocks, sequences]."""
        return self._watermarks.copy()

    def tokens(self, row: int = 0) -> list[int]:
        """Token ids of a sequence so far."""
        return [int(token) for token in self._tokens[row, : self._lengths[row]]]

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
        before = self._lengths.copy()
        for row, ids in enumerate(new):
            self._tokens[row, before[row] : before[row] + len(ids)] = ids
            self._lengths[row] += len(ids)
        self._forget_other_context(before)
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
        waiting = self._lengths - self._watermarks[depth - 1]
        return self._run(waiting.tolist(), depth, every_position)

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
                result = self._engines.logits(np.ascontiguousarray(hidden[:, -1]), final=final)
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
        if not 0 <= length <= self._lengths[row]:
            raise UsageError(
                f"can't rewind to {length} tokens: the sequence has {self._lengths[row]}",
                hint="rewind only shortens a sequence",
            )
        before = self._lengths.copy()
        self._lengths[row] = length
        np.minimum(self._watermarks[:, row], length, out=self._watermarks[:, row])
        self._forget_other_context(before)

    def _check(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
        nested = len(token_ids) > 0 and not isinstance(token_ids[0], int | np.integer)
        new: list[Sequence[int]] = list(token_ids) if nested else [token_ids]  # type: ignore[arg-type, list-item]
        if len(new) != self.batch_size:
            raise UsageError(
                f"got tokens for {len(new)} sequences, the session has {self.batch_size}",
                hint="give one list of token ids per sequence",
            )
        for row, ids in enumerate(new):
            length = int(self._lengths[row]) + len(ids)
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

    def _forget_other_context(self, before: Int32) -> None:
        """LongRoPE rotates every position by the sequence's length class: a change starts over."""
        if self.spec.rotary_switch is None:
            return
        switch = self.spec.rotary_switch
        changed = (before > switch) != (self._lengths > switch)
        self._watermarks[:, changed] = 0

    def _long_context(self, row: int) -> bool:
        return self.spec.rotary_switch is not None and bool(
            self._lengths[row] > self.spec.rotary_switch
        )

    def _groups(self, counts: list[int], depth: int) -> Iterator[slice]:
        """Sequences that can run together: neighbours with exactly one token to run everywhere."""
        watermarks = self._watermarks[:depth]
        alone = (watermarks != self._lengths - 1).any(axis=0)
        start = 0
        while start < self.batch_size:
            stop = start + 1
            if counts[start] and not alone[start]:
                long = self._long_context(start)
                while (
                    stop < self.batch_size
                    and counts[stop]
                    and not alone[stop]
                    and self._long_context(stop) == long
                ):
                    stop += 1
            if counts[start]:
                yield slice(start, stop)
            start = stop

    def _deepen(self, rows: slice, depth: int) -> Float32:
        """Runs the first blocks on all that waits before them.

        Args:
            rows: One sequence, or several that have exactly one token to run everywhere.
            depth: Blocks to run.

        Returns:
            Hidden states [rows, tokens, H] of the newest tokens after `depth` blocks.
        """
        row, end = rows.start, int(self._lengths[rows.start])
        starts, long = self._watermarks[0, rows].copy(), self._long_context(rows.start)
        hidden = self._embed(rows, starts)  # none, where only tokens that wait are to run
        for block, start in enumerate(self._watermarks[:depth, row].tolist()):
            covered = end - hidden.shape[1]
            if start < covered:
                waiting = self._waiting[block][rows, start:covered]
                hidden = np.concatenate([waiting, hidden], axis=1)
                starts = self._watermarks[block, rows].copy()
            if hidden.shape[1]:
                hidden = self._cache.run_block(block, hidden, rows, starts, long_context=long)
        if depth < self.spec.blocks:
            self._wait(depth, rows, starts, hidden)
        # Raised together, when all is done: a pass that is interrupted can be run again.
        self._watermarks[:depth, rows] = self._lengths[rows]
        return hidden

    def _embed(self, rows: slice, starts: Int32) -> Float32:
        count = int(self._lengths[rows.start] - starts[0])
        positions: Int32 = starts[:, None] + np.arange(count, dtype=np.int32)  # type: ignore[assignment]
        ids = self._tokens[np.arange(rows.start, rows.stop)[:, None], positions]
        return self._cache.embed(ids, positions)

    def _wait(self, depth: int, rows: slice, starts: Int32, hidden: Float32) -> None:
        """Keeps hidden states for a later pass that goes deeper."""
        if depth not in self._waiting:
            shape = (self.batch_size, self.max_length, self.spec.hidden_size)
            self._waiting[depth] = np.empty(shape, np.float32)
        if hidden.shape[1] == 1:
            self._waiting[depth][np.arange(rows.start, rows.stop), starts] = hidden[:, 0]
        else:
            start = int(starts[0])
            self._waiting[depth][rows, start : start + hidden.shape[1]] = hidden


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
