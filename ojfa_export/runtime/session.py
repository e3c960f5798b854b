"""A session: advancing sequences to an exit, fixed or decided, and checks in the shadow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Float32, Hidden, Int32
from ojfa_export.backends.choice import Choices, Choosing, Stop
from ojfa_export.errors import UsageError
from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.runtime.sampling import GREEDY, Sampling
from ojfa_export.runtime.watched import Watched

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


@dataclass(frozen=True)
class Choice:
    """What `Session.choose` gave.

    Attributes:
        tokens: [sequences] each sequence's next token; -1 for sequences without new tokens.
        blocks_run: [sequences] blocks run; 0 for sequences without new tokens.
        confidence: As of `Step`.
    """

    tokens: list[int]
    blocks_run: list[int]
    confidence: NDArray[np.float64]


@dataclass(frozen=True)
class Started:
    """A step whose tokens may not be known yet.

    Attributes:
        choices: What chooses them; None where no sequence has new tokens.
        rows: Sequences with new tokens.
        lengths: Tokens of each of them.
        depth: Blocks run.
    """

    choices: Choices | None
    rows: list[int]
    lengths: list[int]
    depth: int


# In place of a token that is not known yet.
UNKNOWN = -1
C = TypeVar("C", bound=Choices)


@dataclass(frozen=True)
class _Taken(Generic[C]):
    """The answer that a sequence stopped at: a row of a head's choices."""

    choices: C
    index: int


def _of(draws: Sequence[float], wanted: Sequence[bool]) -> list[float]:
    """The draws of some sequences; none where tokens aren't sampled."""
    return [draw for draw, each in zip(draws, wanted, strict=True) if each] if draws else []


class Session(Watched):
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
                likeliest = None if every_position else int(answers[row].argmax())
                self._watch(row, depth, likeliest)
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
        taken, blocks_run, asked = self._decide(token_ids, policy, self._choose_on_host)
        logits = np.zeros((self.batch_size, self.spec.vocab_size), np.float32)
        for row, answer in enumerate(taken):
            if answer is not None:
                logits[row] = answer.choices.logits[answer.index]
        return Step(logits, np.array(blocks_run, np.int32), asked)

    def choose(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit | ExitPolicy = "full",
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> Choice:
        """Appends tokens and chooses the next, as `advance` and `decide` with `Sampling.pick`.

        Where the model runs on a device it is done there, and no logits come to the host.

        Args:
            token_ids: As of `advance`.
            exit: Blocks to run, or the policy that decides.
            sampling: How tokens are chosen.
            draws: A number from [0, 1) for each sequence, where they are sampled.

        Raises:
            UsageError: An exit or a token outside the model, or no room in the cache; the session
                is unchanged.
        """
        if isinstance(exit, ExitPolicy):
            taken, blocks_run, asked = self._decide(token_ids, exit, self._choose, sampling, draws)
            tokens = [-1 if each is None else each.choices.tokens()[each.index] for each in taken]
            return Choice(tokens, blocks_run, asked)
        return self.finish(self.start(token_ids, exit, sampling, draws))

    def start(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit = "full",
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> Started:
        """Begins what `choose` does at a fixed exit; `finish` ends it, and must come next.

        Only `follow` may come between.
        """
        depth = resolve_exit(exit, self.spec.blocks)
        wanted = [count > 0 for count in self._append(token_ids)]
        return self._start(wanted, depth, Choosing(sampling, _of(draws, wanted)))

    def can_follow(self, started: Started) -> bool:
        """Whether the step after a step can begin before that one's tokens are known.

        That is where a device chooses them, every sequence goes on and has room, and nobody looks
        at what is chosen.
        """
        return (
            self._engines.follows
            and len(started.rows) == self.batch_size
            and max(self.lengths) < self.max_length
            and self.spec.rotary_switch is None
            and self.on_event is None
            and self.shadow is None
        )

    def follow(
        self, started: Started, sampling: Sampling = GREEDY, draws: Sequence[float] = ()
    ) -> Started:
        """Begins the step after a step; see `can_follow`.

        Where another token comes than the one that was chosen, `rewind` to the length before.
        """
        everyone = [True] * self.batch_size
        for tokens in self._tokens:
            tokens.append(UNKNOWN)
        self._newest_pass = None
        self._following = started.choices
        try:
            return self._start(everyone, started.depth, Choosing(sampling, draws))
        finally:
            self._following = None

    def finish(self, started: Started) -> Choice:
        """Waits for the tokens that a step chooses."""
        rows, depth = started.rows, started.depth
        tokens, blocks_run = [-1] * self.batch_size, [0] * self.batch_size
        if started.choices is not None:
            for row, length, token in zip(
                rows, started.lengths, started.choices.tokens(), strict=True
            ):
                tokens[row], blocks_run[row] = token, depth
                if len(self._tokens[row]) > length:  # of the step that follows
                    self._tokens[row][length] = token
            self._count(len(rows), depth)
            self.stats.exits[depth] += len(rows)
            if self.on_event is not None or self.shadow is not None:
                for row, likeliest in zip(rows, started.choices.likeliest(), strict=True):
                    self._watch(row, depth, likeliest)
        return Choice(tokens, blocks_run, np.empty((0, self.batch_size)))

    def _start(self, wanted: Sequence[bool], depth: int, how: Choosing) -> Started:
        rows = [row for row, each in enumerate(wanted) if each]
        choices = None
        if rows:
            choices = self._engines.choose(self._newest(wanted, depth), depth, how)
        return Started(choices, rows, [len(self._tokens[row]) for row in rows], depth)

    def _decide(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        policy: ExitPolicy,
        choose: Callable[[Hidden, int, Choosing], C],
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> tuple[list[_Taken[C] | None], list[int], NDArray[np.float64]]:
        """What each sequence's new tokens ended in, blocks run, and confidence at each exit."""
        policy.check_fits(self.spec.blocks)
        going = [count > 0 for count in self._append(token_ids)]
        taken: list[_Taken[C] | None] = [None] * self.batch_size
        blocks_run = [0] * self.batch_size
        asked = np.full((len(policy.exits), self.batch_size), np.nan)
        exits = (*policy.exits, self.spec.blocks)
        for index, depth in enumerate(exits):
            rows = [row for row, each in enumerate(going) if each]
            if not rows:
                break
            stop = None
            if depth < self.spec.blocks:
                then = range(depth, exits[index + 1])
                stop = Stop(policy.measure, policy.thresholds[index], then)
            how = Choosing(sampling, _of(draws, going), stop)
            choices = choose(self._newest(going, depth), depth, how)
            stopped = list(range(len(rows)))
            if stop is not None:
                said = choices.confidence(stop.measure)
                asked[index, rows] = said
                self.stats.checks += len(rows)
                stopped = [at for at in stopped if said[at] >= stop.threshold]
                if stopped:
                    total = float(said[stopped].sum())
                    self.stats.count_stopped(depth, len(stopped), total)
            for at in stopped:
                row = rows[at]
                taken[row], blocks_run[row], going[row] = _Taken(choices, at), depth, False
        self.stats.exits.update(blocks for blocks in blocks_run if blocks)
        if self.on_event is not None or self.shadow is not None:
            for row, answer in enumerate(taken):
                if answer is not None:
                    said = asked[:, row][~np.isnan(asked[:, row])]
                    likeliest = answer.choices.likeliest()[answer.index]
                    self._watch(row, blocks_run[row], likeliest, tuple(said.tolist()))
        return taken, blocks_run, asked

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
