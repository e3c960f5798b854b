"""A session: advancing sequences to an exit, fixed or decided, and checks in the shadow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Float32, Int32
from ojfa_export.backends.choice import Choices, HostChoices
from ojfa_export.errors import UsageError
from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.runtime.sampling import GREEDY, Sampling
from ojfa_export.runtime.steps import C, Stage, Started, Taken, stages_of
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


# In place of a token that is not known yet.
UNKNOWN = -1


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
        step: Started[HostChoices] = self._append_step(token_ids, policy)
        while not step.decided:
            stage = step.next_stage
            hidden = self._newest(step.going, stage.depth)
            logits = self._engines.logits(hidden, stage.depth)
            step.add(stage, HostChoices(logits, step.how(stage)))
            if stage.stop is not None:
                step.judge()
        logits = np.zeros((self.batch_size, self.spec.vocab_size), np.float32)
        blocks_run = np.zeros(self.batch_size, np.int32)
        ends, confidence = step.taken(), step.confidence()
        for row, taken in enumerate(ends):
            if taken is not None:
                logits[row] = taken.choices.logits[taken.index]
                blocks_run[row] = taken.depth
        self._account(step, ends, confidence)
        return Step(logits, blocks_run, confidence)

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
        return self.finish(self.start(token_ids, exit, sampling, draws))

    def start(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit | ExitPolicy = "full",
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> Started[Choices]:
        """Begins what `choose` does; `finish` ends it, and must come next.

        Only `follow` may come between.
        """
        step: Started[Choices] = self._append_step(token_ids, exit, sampling, draws)
        self._begin(step)
        return step

    def can_follow(self, started: Started[Choices]) -> bool:
        """Whether the step after a step can begin before that one's tokens are known.

        That is where a device chooses them, every sequence stops at one head and has room, and
        nobody looks at what is chosen. Waits until it is known where they stop.
        """
        if (
            not self._engines.follows
            or self.on_event is not None
            or self.shadow is not None
            or self.spec.rotary_switch is not None
            or max(started.lengths) >= self.max_length
        ):
            return False
        self._settle(started)
        last = started.last
        return last is not None and len(last.rows) == self.batch_size

    def follow(
        self,
        started: Started[Choices],
        exit: Exit | ExitPolicy = "full",
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> Started[Choices]:
        """Begins the step after a step, as `start` does; see `can_follow`.

        Where another token comes than the one that was chosen, `rewind` to the length before.
        """
        assert started.last is not None
        stages = self._stages(exit)
        for tokens in self._tokens:
            tokens.append(UNKNOWN)
        self._newest_pass = None
        self._following = started.last.choices
        everyone = [True] * self.batch_size
        step: Started[Choices] = Started(stages, everyone, self.lengths, sampling, draws)
        try:
            self._begin(step)
        except BaseException:
            for row, length in enumerate(step.lengths):
                self.rewind(length - 1, row)
            raise
        finally:
            self._following = None
        return step

    def finish(self, started: Started[Choices]) -> Choice:
        """Waits for the tokens that a step chooses."""
        self._settle(started)
        ends, confidence = started.taken(), started.confidence()
        blocks_run = [0 if taken is None else taken.depth for taken in ends]
        self._account(started, ends, confidence)
        tokens = [-1] * self.batch_size
        for row, taken in enumerate(ends):
            if taken is not None:
                tokens[row] = taken.choices.tokens()[taken.index]
                length = started.lengths[row]
                if len(self._tokens[row]) > length:  # of the step that follows
                    self._tokens[row][length] = tokens[row]
        return Choice(tokens, blocks_run, confidence)

    def _append_step(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        exit: Exit | ExitPolicy,
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> Started[C]:
        """Takes new tokens, for a step that begins with them."""
        stages = self._stages(exit)
        wanted = [count > 0 for count in self._append(token_ids)]
        return Started(stages, wanted, self.lengths, sampling, draws)

    def _stages(self, exit: Exit | ExitPolicy) -> tuple[Stage, ...]:
        if isinstance(exit, ExitPolicy):
            return stages_of(exit, self.spec.blocks)
        return (Stage(resolve_exit(exit, self.spec.blocks)),)

    def _begin(self, step: Started[Choices]) -> None:
        if len(step.rows) == self.batch_size:
            step.together = self._one_each()
        if step.rows:
            self._ask(step, self._prepare(step))

    def _prepare(self, step: Started[Choices]) -> Callable[[], Choices] | None:
        """What runs all sequences on to the next head together, if that can be."""
        stage, one = step.next_stage, step.together
        if one is None or stage.depth > one.clear:
            return None
        kept = self._kept(stage.depth)
        return self._engines.prepare(self._cache, one, stage.depth, kept, step.how(stage))

    def _ask(self, step: Started[Choices], prepared: Callable[[], Choices] | None) -> None:
        """Runs the sequences that go on to the next head, and asks it."""
        stage = step.next_stage
        if prepared is not None:
            step.add(stage, prepared())
            for tokens, marks in zip(self._tokens, self._watermarks, strict=True):
                marks.raise_to(len(tokens), stage.depth)
            return
        one, step.together = step.together, None
        if one is not None and one.depth:
            self._newest_pass = one.depth, one.rows, one.starts, one.hidden
        hidden = self._newest(step.going, stage.depth)
        step.add(stage, self._engines.choose(hidden, stage.depth, step.how(stage)))

    def _settle(self, step: Started[Choices]) -> None:
        """Goes on with a step until it is known where each sequence stops."""
        while not step.decided:
            rows, prepared = step.rows, None
            if not step.judged:
                # What may follow is looked up while the answer is on its way.
                if self._keeps(step.next_stage.depth):
                    prepared = self._prepare(step)
                step.judge()
            if step.rows is rows:
                self._ask(step, prepared or self._prepare(step))
            elif step.rows:
                self._ask(step, None)

    def _account(
        self, step: Started[C], ends: list[Taken[C] | None], confidence: NDArray[np.float64]
    ) -> None:
        """Counts a step whose sequences stopped where they did, and tells of it."""
        step.count(self.stats, self.spec.blocks)
        for taken in ends:
            if taken is not None:
                self.stats.exits[taken.depth] += 1
        if self.on_event is None and self.shadow is None:
            return
        for row, taken in enumerate(ends):
            if taken is not None:
                said = confidence[:, row][~np.isnan(confidence[:, row])]
                likeliest = taken.choices.likeliest()[taken.index]
                self._watch(row, taken.depth, likeliest, tuple(said.tolist()))

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
