"""A session: advancing sequences to an exit, fixed or decided, and checks in the shadow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines, Float32, Hidden, Int32
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.events import ExitTaken, Listener, ShadowCheck
from ojfa_export.runtime.policy import ExitPolicy, confidence
from ojfa_export.runtime.sequences import Sequences
from ojfa_export.runtime.shadow import Due, Shadow
from ojfa_export.runtime.stats import Stats

Exit = int | Literal["full"]
# Rows of logits that a comparison holds at a time: one takes 4 V bytes.
_ROWS_AT_ONCE = 32


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


class Session(Sequences):
    """Sequences in progress: see `Sequences` for what passes do.

    Not thread-safe; make a session per thread.

    Args:
        spec: The model.
        engines: The opened engines.
        batch_size: Sequences.
        max_length: Tokens that a sequence may hold.
        shadow: Chooses tokens to be compared with the full model; see `run_shadow_checks`.

    Attributes:
        stats: What the session has done.
        shadow: As given.
        on_event: Called with each `ExitTaken`, `DraftChecked` and `ShadowCheck`, in the middle of
            the step; it must not use the session.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        batch_size: int,
        max_length: int,
        shadow: Shadow | None = None,
    ) -> None:
        super().__init__(spec, engines, batch_size, max_length, keep_final=shadow is not None)
        self.stats = Stats()
        self.shadow = shadow
        self.on_event: Listener | None = None
        self._engines = engines

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
        answers = self._run(counts, depth, every_position)
        if self.on_event is not None or (self.shadow is not None and not every_position):
            for row in (row for row, count in enumerate(counts) if count):
                self._watch(row, depth, None if every_position else answers[row])
        return answers

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
            if len(stopped):
                self.stats.count_stopped(depth, len(stopped), float(asked[index, stopped].sum()))
        logits[going] = self._answer(going.tolist(), self.spec.blocks)
        blocks_run[going] = self.spec.blocks
        self.stats.exits.update(blocks_run[blocks_run > 0].tolist())
        if self.on_event is not None or self.shadow is not None:
            for row in np.flatnonzero(blocks_run).tolist():
                said = asked[:, row][~np.isnan(asked[:, row])]
                self._watch(row, int(blocks_run[row]), logits[row], tuple(said.tolist()))
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

    def run_shadow_checks(self, budget: int | None = None) -> list[ShadowCheck]:
        """Completes chosen early tokens to full depth and compares them with the full model.

        To be called when the machine has nothing better to do: between tokens, or after the
        sequence. Completing is the catching up that a later, deeper token would have caused, so
        that later tokens are the same with checks as without. All tokens of a sequence that wait
        are completed in one pass.

        Args:
            budget: Comparisons at most, oldest tokens first; None for all that are due.

        Returns:
            The comparisons; `stats` counts them.

        Raises:
            UsageError: The session was made without a `shadow`, or a negative budget.
        """
        if self.shadow is None or self._final is None:
            raise UsageError(
                "this session chooses no tokens for shadow checks",
                hint="make it with Model.session(monitor=...)",
            )
        if budget is not None and budget < 0:
            raise UsageError(f"the budget of shadow checks must be 0 or more, not {budget}")
        due, blocks = self.shadow.due[:budget], self.spec.blocks
        waiting = [False] * self.batch_size
        for each in due:
            waiting[each.row] |= self._watermarks[each.row][blocks - 1] <= each.position
        for rows in self._groups(waiting, blocks):
            self._deepen(rows, blocks, waiting)
        checks = []
        for start in range(0, len(due), _ROWS_AT_ONCE):
            part = due[start : start + _ROWS_AT_ONCE]
            states = self._final[[each.row for each in part], [each.position for each in part]]
            choices = self._head(states, blocks).argmax(axis=1).tolist()
            for each, choice in zip(part, choices, strict=True):
                agrees = each.choice == choice
                checks.append(ShadowCheck(each.row, each.position, each.blocks_run, agrees))
                self._checked(self.shadow, checks[-1])
        return checks

    def rewind(self, length: int, row: int = 0) -> None:
        """Drops the tokens after the first `length`: a change of numbers, nothing is computed.

        Raises:
            UsageError: A row that isn't there, or more tokens than it has.
        """
        long = self._long_context(row) if 0 <= row < self.batch_size else False
        super().rewind(length, row)
        if self.shadow is not None:
            # What was said with the long factors can't be compared once they no longer apply.
            self.shadow.forget(row, 0 if long != self._long_context(row) else length)

    def _append(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[int]:
        switch = self.spec.rotary_switch
        if self.shadow is not None and self.shadow.due and switch is not None:
            both = zip(self.lengths, self._check(token_ids), strict=True)
            if any(length <= switch < length + len(ids) for length, ids in both):
                self.run_shadow_checks()  # beyond the switch the full model's past is another
        return super()._append(token_ids)

    def _watch(
        self, row: int, depth: int, logits: Float32 | None, confidence: tuple[float, ...] = ()
    ) -> None:
        """Tells of a sequence's newest token, whose logits are [V], and may choose it."""
        position = len(self._tokens[row]) - 1
        if self.on_event is not None:
            self.on_event(ExitTaken(row, position, depth, confidence))
        if self.shadow is None or logits is None or not self.shadow.choose():
            return
        if depth < self.spec.blocks:
            self.shadow.add(Due(row, position, depth, int(logits.argmax())))
        else:
            self._checked(self.shadow, ShadowCheck(row, position, depth, True))

    def _checked(self, shadow: Shadow, check: ShadowCheck) -> None:
        shadow.record(check)
        if check.blocks_run < self.spec.blocks:
            self.stats.shadow_checks += 1
            self.stats.shadow_disagreements += not check.agrees
        if self.on_event is not None:
            self.on_event(check)

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
        if depth == self.spec.blocks:
            self.stats.final_heads += len(hidden)
        else:
            self.stats.exit_heads += len(hidden)
        return self._engines.logits(hidden, depth)


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
