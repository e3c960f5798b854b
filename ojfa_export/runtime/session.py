"""A session: a batch of sequences that its caller advances, to fixed exits or to decided ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.draft import DraftEngines
from ojfa_export.decoding.arrays import Float32, Hidden, Int32
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.events import Listener, ShadowCheck
from ojfa_export.decoding.exits import Exit, resolve_exit
from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import GREEDY, Sampling, check_draws
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.batch import TokenIds, check_counts, check_tokens
from ojfa_export.runtime.exclusive import Exclusive, exclusive
from ojfa_export.runtime.exit_confidence import exit_confidence
from ojfa_export.runtime.proposals import Proposals, Round
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence as TokenSequence
from ojfa_export.runtime.shadow import Shadow
from ojfa_export.runtime.shadow_checks import ShadowChecks
from ojfa_export.runtime.stats import Stats
from ojfa_export.runtime.step_output import Choice, Step
from ojfa_export.runtime.step_runner import StepRunner
from ojfa_export.runtime.steps import C, Stage, stages_of
from ojfa_export.runtime.steps import Step as RunningStep
from ojfa_export.system.arguments import instance, is_whole, shown


class Session(Exclusive):
    """Sequences in progress, one in each row of a batch.

    Each sequence has a watermark per block (`runtime.sequence`): a token that stopped at an exit is
    pending there, and when a later one goes deeper it catches up in the same pass.

    One thread at a time may use it: a second one gets a UsageError.

    Args:
        spec: The model.
        engines: The opened engines.
        batch_size: Sequences.
        max_length: Tokens that a sequence may hold.
        shadow: Chooses tokens to be compared with the full model; see `run_shadow_checks`.
        drafts: The draft layer, where `propose` shall draft with it.

    Attributes:
        exits: Those that there are before the last block.
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
        drafts: DraftEngines | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.batch_size = batch_size
        self.max_length = max_length
        behind = engines.exit_blocks
        self.exits = tuple(range(1, spec.blocks)) if behind is None else behind.exits
        self.stats = Stats()
        self.shadow = shadow
        self._engines = engines
        self._runner = ModelRunner(
            spec, engines, batch_size, max_length, keep_final=shadow is not None, drafts=drafts
        )
        depth = None if drafts is None else drafts.depths[-1]
        self._sequences = [
            TokenSequence(slot, spec.blocks, spec.rotary_switch, depth)
            for slot in range(batch_size)
        ]
        self._steps = StepRunner(self._runner)
        self._proposals = Proposals(self._runner, self._sequences)
        self._checks = ShadowChecks(self._runner, self._sequences, self)
        self.on_event: Listener | None = None

    @property
    def has_drafts(self) -> bool:
        """Whether a draft layer drafts for its sequences."""
        return self._runner.drafter is not None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence) for sequence in self._sequences]

    @property
    def watermarks(self) -> Int32:
        """Tokens that each block has processed, [blocks, sequences]."""
        blocks = range(self.spec.blocks)
        marks = [[sequence.marks[block] for sequence in self._sequences] for block in blocks]
        return np.array(marks, np.int32)

    def tokens(self, row: int = 0) -> list[int]:
        """Token ids of a sequence so far.

        Raises:
            UsageError: A row that isn't there.
        """
        return list(self._sequences[self._row(row)].tokens)

    @exclusive
    def rewind(self, length: int, row: int = 0) -> None:
        """Drops the tokens after the first `length`: a change of numbers, nothing is computed.

        Raises:
            UsageError: A row that isn't there, or more tokens than it has.
        """
        row = self._row(row)
        sequence = self._sequences[row]
        if not is_whole(length) or not 0 <= length <= len(sequence):
            raise UsageError(
                f"can't rewind to {shown(length)} tokens: the sequence has {len(sequence)}",
                hint="rewind only shortens a sequence",
            )
        long = sequence.long_context
        sequence.truncate(length)
        if self.shadow is not None:
            # What was said with the long factors can't be compared once they no longer apply.
            self.shadow.forget(row, 0 if long != sequence.long_context else length)

    @overload
    def advance(
        self, token_ids: TokenIds, exit: Exit = ..., *, every_position: Literal[False] = ...
    ) -> Float32: ...

    @overload
    def advance(
        self, token_ids: TokenIds, exit: Exit = ..., *, every_position: Literal[True]
    ) -> list[Float32]: ...

    @exclusive
    def advance(
        self, token_ids: TokenIds, exit: Exit = "full", *, every_position: bool = False
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
        depth = resolve_exit(exit, self.spec.blocks, self.exits)
        counts = self._append(token_ids)
        self.stats.exits[depth] += sum(count > 0 for count in counts)
        logits = self._logits(counts, depth, every_position)
        if self.on_event is not None or (self.shadow is not None and not every_position):
            for row in (row for row, count in enumerate(counts) if count):
                likeliest = None if every_position else int(logits[row].argmax())
                self._checks.watch(row, depth, likeliest)
        return logits

    @exclusive
    def decide(self, token_ids: TokenIds, policy: ExitPolicy) -> Step:
        """Appends tokens and runs each sequence until an exit is confident of its next token.

        The newest token of each sequence is what the exit head is asked about; the others of a
        prompt stop where it stops.

        Args:
            token_ids: As of `advance`.
            policy: Where to ask, and the thresholds of confidence.

        Raises:
            UsageError: An exit or a token outside the model, or no room in the cache; the session
                is unchanged.
        """
        stages = stages_of(instance("a policy", policy, ExitPolicy), self.spec.blocks, self.exits)
        step = self._steps.with_logits(self._wanted(self._append(token_ids)), stages)
        self._tell(step)
        return Step.of(step, self.batch_size, self.spec.vocab_size, len(policy.exits))

    @exclusive
    def choose(
        self,
        token_ids: TokenIds,
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

    @exclusive
    def start(
        self,
        token_ids: TokenIds,
        exit: Exit | ExitPolicy = "full",
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> RunningStep[HeadOutput]:
        """Begins what `choose` does; `finish` ends it, and must come next.

        Only `follow` may come between.
        """
        stages = self._stages(exit)
        draws = check_draws(sampling, draws, self.batch_size)
        return self._steps.start(self._wanted(self._append(token_ids)), stages, sampling, draws)

    @exclusive
    def can_follow(self, step: RunningStep[HeadOutput]) -> bool:
        """Whether the step after a step can begin before that one's tokens are known.

        That is where a device chooses them, every sequence stops at one head and has room, and
        nobody looks at what is chosen. Waits until it is known where they stop.
        """
        instance("a step", step, RunningStep)
        watched = self.on_event is not None or self.shadow is not None
        if watched or self.spec.rotary_switch is not None or not self._engines.follows:
            return False
        if len(step.rows) < self.batch_size or max(step.lengths) >= self.max_length:
            return False
        return self._steps.stop_together(step)

    @exclusive
    def follow(
        self,
        step: RunningStep[HeadOutput],
        exit: Exit | ExitPolicy = "full",
        sampling: Sampling = GREEDY,
        draws: Sequence[float] = (),
    ) -> RunningStep[HeadOutput]:
        """Begins the step after a step, as `start` does; see `can_follow`.

        Where another token comes than the one that was chosen, `rewind` to the length before.
        """
        instance("a step", step, RunningStep)
        draws = check_draws(sampling, draws, self.batch_size)
        return self._steps.follow(step, self._stages(exit), sampling, draws)

    @exclusive
    def finish(self, step: RunningStep[HeadOutput]) -> Choice:
        """Waits for the tokens that a step chooses."""
        instance("a step", step, RunningStep)
        self._steps.settle(step)
        self._tell(step)
        choice = Choice.of(step, self.batch_size)
        for row in step.rows:
            if row.sequence.expected:  # by the step that follows
                row.sequence.append([choice.tokens[row.sequence.slot]])
        return choice

    @exclusive
    def complete(self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Float32]:
        """Appends tokens and runs all that is pending, and them, through all blocks.

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
        counts = self._append_before_completing(token_ids, counts)
        return self._logits(counts, self.spec.blocks, True)

    @exclusive
    def complete_greedily(
        self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[list[int]]:
        """As `complete`, with the token of the largest logit in place of each row of logits."""
        counts = self._append_before_completing(token_ids, counts)
        wanted = [row for row, count in enumerate(counts) if count > 0]
        if not wanted:
            return [[] for _ in counts]
        self.stats.count_head(sum(counts), final=True)
        sequences = [self._sequences[row] for row in wanted]
        output = self._runner.check(sequences, [counts[row] for row in wanted])
        best = iter(output.likeliest())
        return [list(islice(best, count)) for count in counts]

    def can_propose(self, row: int = 0) -> bool:
        """Whether `propose` can take a sequence's next token.

        All tokens so far have run then, and another doesn't have LongRoPE run them again.

        Raises:
            UsageError: A row that isn't there.
        """
        return self._proposals.can_begin(self._sequences[self._row(row)])

    @exclusive
    def propose(self, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """Appends a token to each sequence, and drafts the one after it with the draft layer.

        The first token of a round of drafts is one that was chosen at full depth, the others are
        drafts; they are pending then, to be verified by `complete_greedily`.

        Args:
            token_ids: One of each sequence; a sequence with none stays as it is.

        Returns:
            The draft layer's likeliest token of each sequence; -1 for one without new tokens.

        Raises:
            UsageError: A token outside the model, no room in the cache, or a sequence of which the
                draft layer doesn't know the tokens before; the session is unchanged.
        """
        return self._proposals.tokens(self._append_to_propose(token_ids))

    @exclusive
    def propose_logits(self, token_ids: Sequence[Sequence[int]]) -> Float32:
        """As `propose`, with the draft layer's logits in place of its tokens.

        Returns:
            [sequences, V] float32, -inf for tokens that it never drafts; rows of sequences without
            new tokens are zero.
        """
        return self._proposals.logits(self._append_to_propose(token_ids))

    @property
    def proposes_at_once(self) -> bool:
        """Whether there is a short way for `propose_and_complete`: on a device."""
        drafter = self._runner.drafter
        return drafter is not None and drafter.chains

    @exclusive
    def propose_and_complete(
        self, token_ids: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Does `propose` draft after draft, and then `complete_greedily`, at once.

        Drafts are in the session then, up to the largest of the limits: `rewind` drops them.

        Args:
            token_ids: New tokens of each sequence; a sequence with none stays as it is.
            limits: How many drafts of each count, 1 or more where there is one token after which
                the draft layer can draft (`can_propose`); 0 for none.

        Returns:
            The drafts of each sequence, and the full model's likeliest tokens: after the newest of
            the new tokens, after each draft, and maybe after more that don't count.

        Raises:
            UsageError: As of `propose`, or no short way; the session is unchanged.
        """
        return self.finish_round(self.begin_round(token_ids, limits))

    @exclusive
    def begin_round(self, token_ids: Sequence[Sequence[int]], limits: Sequence[int]) -> Round:
        """Begins what `propose_and_complete` does, without waiting for it where all draft.

        Until `finish_round` the session takes nothing but `rewind`, which drops the round.

        Raises:
            UsageError: As of `propose_and_complete`.
        """
        new = check_tokens(token_ids, self._sequences, self.max_length, self.spec.vocab_size)
        if not self.proposes_at_once:
            raise UsageError("this session can't propose and complete at once")
        self._proposals.check([ids if limits[row] else [] for row, ids in enumerate(new)])
        self._append(new)
        return self._proposals.begin([row for row, ids in enumerate(new) if ids], limits)

    @exclusive
    def finish_round(self, begun: Round) -> tuple[list[list[int]], list[list[int]]]:
        """Waits for a round that was begun: see `propose_and_complete`."""
        drafts, best = self._proposals.finish(begun)
        self.stats.count_head(sum(map(len, best)), final=True)
        return drafts, best

    def _append_to_propose(self, token_ids: Sequence[Sequence[int]]) -> list[int]:
        """Takes new tokens where the draft layer can go on from there; whose they are."""
        new = check_tokens(token_ids, self._sequences, self.max_length, self.spec.vocab_size)
        rows = self._proposals.check(new)
        self._append(new)
        return rows

    @overload
    def deepen(self, exit: Exit = ..., *, every_position: Literal[False] = ...) -> Float32: ...

    @overload
    def deepen(self, exit: Exit = ..., *, every_position: Literal[True]) -> list[Float32]: ...

    @exclusive
    def deepen(
        self, exit: Exit = "full", *, every_position: bool = False
    ) -> Float32 | list[Float32]:
        """Runs tokens that stopped earlier through more blocks, without new tokens.

        Args:
            exit: Blocks that they shall have run.
            every_position: Whether to give the logits of every token that ran, not just the last.

        Returns:
            As `advance`; rows of sequences in which nothing was pending are zero or empty.

        Raises:
            UsageError: An exit outside the model.
        """
        depth = resolve_exit(exit, self.spec.blocks, self.exits)
        pending = [sequence.pending(depth) for sequence in self._sequences]
        return self._logits(pending, depth, every_position)

    @exclusive
    def confidence(
        self, logits: Float32, exit: Exit, measure: Measure, row: int = 0
    ) -> NDArray[np.float64]:
        """How sure a policy takes an exit to be of a sequence's newest tokens.

        That is the exit head's confidence, or the check head's, where the bundle has one.

        Args:
            logits: [n, V], which `advance` or `deepen` has just given of the newest n tokens.
            exit: Where.
            measure: Of confidence.
            row: Of the sequence.

        Returns:
            [n] float64, larger for surer.

        Raises:
            UsageError: An exit outside the model, a row that isn't there, or more tokens than have
                run so deep.
        """
        depth = resolve_exit(exit, self.spec.blocks, self.exits)
        sequence = self._sequences[self._row(row)]
        return exit_confidence(self._runner, sequence, logits, depth, measure)

    @exclusive
    def run_shadow_checks(self, budget: int | None = None) -> list[ShadowCheck]:
        """Completes chosen early tokens to full depth and compares them with the full model.

        To be called when the machine has nothing better to do: between tokens, or after the
        sequence. Completing is the catching up that a later, deeper token would have caused, so
        that later tokens are the same with checks as without. All pending tokens of a sequence are
        completed in one pass.

        Args:
            budget: Comparisons at most, oldest tokens first; None for all that are due.

        Returns:
            The comparisons; `stats` counts them.

        Raises:
            UsageError: The session was made without a `shadow`, or a negative budget.
        """
        return self._checks.run(budget)

    def _append(self, token_ids: TokenIds) -> list[int]:
        """Takes new tokens, which are then pending before the first block; how many of each."""
        new = check_tokens(token_ids, self._sequences, self.max_length, self.spec.vocab_size)
        self._checks.before_appending(new)
        for sequence, ids in zip(self._sequences, new, strict=True):
            if ids:
                sequence.append(ids)
        return [len(ids) for ids in new]

    def _append_before_completing(
        self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[int]:
        """Takes new tokens where the counts fit them; the counts as plain numbers."""
        new = check_tokens(token_ids, self._sequences, self.max_length, self.spec.vocab_size)
        pending = [sequence.pending(self.spec.blocks) for sequence in self._sequences]
        checked = check_counts(counts, new, pending)
        self._append(new)
        return checked

    def _row(self, row: int) -> int:
        if not is_whole(row) or not 0 <= row < self.batch_size:
            raise UsageError(f"row {shown(row)} is outside 0..{self.batch_size - 1}")
        return row

    def _stages(self, exit: Exit | ExitPolicy) -> tuple[Stage, ...]:
        if isinstance(exit, ExitPolicy):
            return stages_of(exit, self.spec.blocks, self.exits)
        return (Stage(resolve_exit(exit, self.spec.blocks, self.exits)),)

    def _wanted(self, counts: Sequence[int]) -> list[TokenSequence]:
        """Sequences with new tokens."""
        both = zip(self._sequences, counts, strict=True)
        return [sequence for sequence, count in both if count]

    def _states(self, counts: Sequence[int], depth: int) -> Hidden | None:
        """Hidden states [sum of counts, H] of each sequence's last tokens at a depth."""
        wanted = [row for row, count in enumerate(counts) if count > 0]
        if not wanted:
            return None
        sequences = [self._sequences[row] for row in wanted]
        return self._runner.run(sequences, depth, [counts[row] for row in wanted])

    @overload
    def _logits(
        self, counts: Sequence[int], depth: int, every_position: Literal[True]
    ) -> list[Float32]: ...

    @overload
    def _logits(
        self, counts: Sequence[int], depth: int, every_position: bool
    ) -> Float32 | list[Float32]: ...

    def _logits(
        self, counts: Sequence[int], depth: int, every_position: bool
    ) -> Float32 | list[Float32]:
        """Runs the first blocks and a head: logits of each sequence's last tokens."""
        counts = list(counts) if every_position else [min(count, 1) for count in counts]
        states = self._states(counts, depth)
        if states is None:
            logits = np.zeros((0, self.spec.vocab_size), np.float32)
        else:
            self.stats.count_head(len(states), final=depth == self.spec.blocks)
            logits = self._engines.logits(states, depth)
        if every_position:
            return np.split(logits, np.cumsum(counts)[:-1])
        if len(logits) == self.batch_size:
            return logits
        result = np.zeros((self.batch_size, self.spec.vocab_size), np.float32)
        result[np.array(counts) > 0] = logits
        return result

    def _tell(self, step: RunningStep[C]) -> None:
        """Counts a step whose sequences stopped where they did, and tells of it."""
        step.finish(self.stats, self.spec.blocks)
        if self.on_event is None and self.shadow is None:
            return
        for row in step.rows:
            assert row.output is not None
            likeliest = row.output.likeliest()[row.index]
            self._checks.watch(row.sequence.slot, row.depth, likeliest, tuple(row.confidence))
