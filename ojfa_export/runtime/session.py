"""A session: sequences, their watermarks, and the one step that everything else is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines, Float32, Hidden, Int32
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.policy import ExitPolicy, confidence
from ojfa_export.runtime.stats import Stats
from ojfa_export.runtime.watermarks import Watermarks

Exit = int | Literal["full"]


@dataclass(frozen=True)
class Step:
    """What `Session.decide` gave.

    Attributes:
        logits: [sequences, V] of the head that each sequence stopped at; zero for sequences
            without new tokens.
        blocks_run: [sequences] blocks run; 0 for sequences without new tokens.
        confidence: [exits of the policy, sequences] float64, NaN where the head wasn't asked.
    """

    logits: Float32
    blocks_run: Int32
    confidence: NDArray[np.float64]


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

    Attributes:
        stats: What the session has done.
    """

    def __init__(self, spec: ModelSpec, engines: Engines, batch_size: int, max_length: int) -> None:
        self.spec = spec
        self.batch_size = batch_size
        self.max_length = max_length
        self.stats = Stats()
        self._engines = engines
        self._cache = engines.new_cache(batch_size, max_length)
        # Plain lists: arrays of a few numbers would cost each step more than they hold.
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._watermarks = [Watermarks(spec.blocks) for _ in range(batch_size)]
        # Hidden states that came out of `depth` blocks and wait for the next: row p is position p.
        self._waiting: dict[int, Hidden] = {}

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
        counts = self._append(token_ids)
        self.stats.exits[depth] += sum(count > 0 for count in counts)
        return self._run(counts, depth, every_position)

    def decide(
        self, token_ids: Sequence[int] | Sequence[Sequence[int]], policy: ExitPolicy
    ) -> Step:
        """Appends tokens and runs each sequence until an exit is sure of its next token.

        The newest token of each sequence is what the exit head is asked about; the others of a
        prompt stop where it stops.

        Args:
            token_ids: As of `advance`.
            policy: Where to ask, and how sure is sure.

        Raises:
            UsageError: An exit or a token outside the model, or no room in the cache; the session
                is unchanged.
        """
        policy.check_fits(self.spec.blocks)
        going = np.array(self._append(token_ids)) > 0
        logits = np.zeros((self.batch_size, self.spec.vocab_size), np.float32)
        blocks_run = np.zeros(self.batch_size, np.int32)
        asked = np.full((len(policy.exits), self.batch_size), np.nan)
        for index, (depth, threshold) in enumerate(
            zip(policy.exits, policy.thresholds, strict=True)
        ):
            if not going.any():
                break
            asked_rows = np.flatnonzero(going)
            answers = self._answer(going.tolist(), depth)
            asked[index, asked_rows] = confidence(answers, policy.measure)
            self.stats.checks += len(asked_rows)
            sure = asked[index, asked_rows] >= threshold
            stopped = asked_rows[sure]
            logits[stopped], blocks_run[stopped], going[stopped] = answers[sure], depth, False
        logits[going] = self._answer(going.tolist(), self.spec.blocks)
        blocks_run[going] = self.spec.blocks
        self.stats.exits.update(blocks_run[blocks_run > 0].tolist())
        return Step(logits, blocks_run, asked)

    def complete(self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Float32]:
        """Appends tokens and runs all that waits, and them, through all blocks.

        Args:
            token_ids: New tokens of each sequence.
            counts: For how many of each sequence's last tokens to give logits: no more than the
                last block hasn't processed. A sequence with 0 and no new tokens is left alone.

        Returns:
            Logits [count, V] of the model's own head for each sequence.

        Raises:
            UsageError: A token outside the model, no room in the cache, or too large a count; the
                session is unchanged.
        """
        new = self._check(token_ids)
        for row, (count, ids) in enumerate(zip(counts, new, strict=True)):
            last_mark = self._watermarks[row][self.spec.blocks - 1]
            waiting = len(self._tokens[row]) - last_mark + len(ids)
            if not min(len(ids), 1) <= count <= waiting:
                raise UsageError(
                    f"asked for the logits of {count} tokens of sequence {row}, of which "
                    f"{waiting} wait for the last block"
                )
        self._append(new)
        return self._run(counts, self.spec.blocks, True)

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

    @overload
    def _run(
        self, counts: Sequence[int], depth: int, every_position: Literal[True]
    ) -> list[Float32]: ...

    @overload
    def _run(
        self, counts: Sequence[int], depth: int, every_position: bool
    ) -> Float32 | list[Float32]: ...

    def _run(
        self, counts: Sequence[int], depth: int, every_position: bool
    ) -> Float32 | list[Float32]:
        """Runs the first blocks and a head; logits of each sequence's last `counts` tokens."""
        wanted = [count > 0 for count in counts]
        if not every_position:
            answers = self._answer(wanted, depth)
            if len(answers) == self.batch_size:
                return answers
            logits = np.zeros((self.batch_size, self.spec.vocab_size), np.float32)
            logits[np.array(wanted)] = answers
            return logits
        arrays = self._cache.arrays
        states = [arrays.empty((0, self.spec.hidden_size), np.float32)] * self.batch_size
        for rows in self._groups(wanted, depth):
            hidden = self._deepen(rows, depth, wanted)
            for row in range(rows.start, rows.stop):
                if wanted[row]:
                    states[row] = hidden[row - rows.start, -counts[row] :].copy()
        return np.split(self._head(arrays.concatenate(states), depth), np.cumsum(counts)[:-1])

    def _answer(self, wanted: Sequence[bool], depth: int) -> Float32:
        """Runs sequences through the first blocks; logits [wanted, V] of their newest tokens."""
        arrays, newest = self._cache.arrays, []
        for rows in self._groups(wanted, depth):
            last = self._deepen(rows, depth, wanted)[:, -1]
            if len(last) == self.batch_size and all(wanted):
                return self._head(arrays.ascontiguousarray(last), depth)
            newest.append(last[np.flatnonzero(wanted[rows])])
        if not newest:
            return np.zeros((0, self.spec.vocab_size), np.float32)
        return self._head(arrays.concatenate(newest), depth)

    def _head(self, hidden: Hidden, depth: int) -> Float32:
        """Logits [n, V] of hidden states [n, H] after `depth` blocks."""
        if not len(hidden):
            return np.zeros((0, self.spec.vocab_size), np.float32)
        final = depth == self.spec.blocks
        if final:
            self.stats.final_heads += len(hidden)
        else:
            self.stats.exit_heads += len(hidden)
        return self._engines.logits(hidden, final=final)

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

    def _groups(self, wanted: Sequence[bool], depth: int) -> Iterator[slice]:
        """Sequences that can run together: those whose one token waits before the same block.

        Rows must be neighbours in the cache. One between them that stopped earlier runs along, as
        that costs less than another pass: it computes something at a position that no block from
        there on has processed, and what it writes is overwritten before it is read.
        """
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
        if marks.all_at(length - 1, depth):
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
        marks, end = self._watermarks[rows.start], len(self._tokens[rows.start])
        starts = [marks[0] for marks in self._watermarks[rows]]
        long = self._long_context(rows.start)
        hidden = self._embed(rows, starts)
        for blocks, start in marks.spans(depth):
            covered = end - hidden.shape[1]
            if start < covered:
                starts = [each[blocks.start] for each in self._watermarks[rows]]
                waiting = self._waited(blocks.start, rows, starts, covered - start)
                join = self._cache.arrays.concatenate
                hidden = join([waiting, hidden], axis=1) if hidden.shape[1] else waiting
            if hidden.shape[1]:
                hidden = self._cache.run_blocks(blocks, hidden, rows, starts, long_context=long)
        if depth < self.spec.blocks:
            self._wait(depth, rows, starts, hidden)
        # Raised together, when all is done: a pass that is interrupted can be run again.
        for row in range(rows.start, rows.stop):
            if wanted[row]:
                self._watermarks[row].raise_to(len(self._tokens[row]), depth)
        return hidden

    def _embed(self, rows: slice, starts: list[int]) -> Hidden:
        """Embeds what waits before the first block: nothing, where tokens wait only later."""
        count = len(self._tokens[rows.start]) - starts[0]
        if not count:
            return self._cache.arrays.empty((len(starts), 0, self.spec.hidden_size), np.float32)
        both = zip(self._tokens[rows], starts, strict=True)
        new = [tokens[start : start + count] for tokens, start in both]
        return self._cache.embed(np.array(new, np.int32), starts)

    def _waited(self, depth: int, rows: slice, starts: list[int], count: int) -> Hidden:
        """The hidden states that `_wait` kept: [rows, count, H], count 1 for several rows."""
        waiting = self._waiting[depth]
        return self._cache.arrays.stack(
            [waiting[rows.start + i, at : at + count] for i, at in enumerate(starts)]
        )

    def _wait(self, depth: int, rows: slice, starts: list[int], hidden: Hidden) -> None:
        """Keeps hidden states for a later pass that goes deeper."""
        if depth not in self._waiting:
            shape = (self.batch_size, self.max_length, self.spec.hidden_size)
            self._waiting[depth] = self._cache.arrays.empty(shape, np.float32)
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
