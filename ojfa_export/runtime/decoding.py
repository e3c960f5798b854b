"""From what a session computes to the next tokens: one per step at a fixed or a decided exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.exits import Exit, resolve_exit
from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.decoding.logits import LogitsProcessor, TokenLogprobs
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.steps import Step


class Chosen(NamedTuple):
    """A token that was chosen.

    Attributes:
        id: Token id.
        blocks_run: Blocks that computed its logits.
        drafted: Whether speculation proposed it before the full model took it.
        logprobs: If they were asked for.
    """

    id: int
    blocks_run: int
    drafted: bool = False
    logprobs: TokenLogprobs | None = None


class Decoder(Protocol):
    """A way to get next tokens."""

    def step(self, pending: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[list[Chosen]]:
        """Goes on with the sequences that have pending tokens.

        Args:
            pending: Tokens of each sequence that the session doesn't have yet.
            wanted: How many more tokens each sequence may use at most.

        Returns:
            Each sequence's next tokens, one or more; none for a sequence without pending tokens.
            The last of them isn't in the session yet; nor, where `wanted` cuts them off, need
            those be that are in the session.
        """
        ...

    def end(self) -> None:
        """To be called after the last step: what was begun ahead leaves the session."""
        ...


class StepByStep:
    """One token per step.

    Args:
        session: With a sequence for each generator.
        exit: A fixed exit, or the policy that decides.
        sampling: How tokens are chosen.
        generators: Random numbers of each sequence.
    """

    def __init__(
        self,
        session: Session,
        exit: Exit | ExitPolicy,
        sampling: Sampling,
        generators: Sequence[np.random.Generator],
    ) -> None:
        self._session, self._exit = session, exit
        self._sampling, self._generators = sampling, generators
        # The step after the last one, begun before anybody asked, and the tokens that it follows.
        self._ahead: Step[HeadOutput] | None = None
        self._followed: list[list[int]] = []
        # By row: a random number that was drawn for a step that wasn't wanted.
        self._unused: dict[int, float] = {}

    @property
    def is_ahead(self) -> bool:
        """Whether the next step was begun before it was asked for."""
        return self._ahead is not None

    def step(self, pending: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[list[Chosen]]:
        """See `Decoder`."""
        session, started = self._session, self._ahead
        if started is None or [list(ids) for ids in pending] != self._followed:
            self.end()
            started = session.start(pending, self._exit, self._sampling, self._draws(pending))
        else:
            self._ahead, self._unused = None, {}
        # The device begins with the next tokens before anything else is done about these.
        if min(wanted) > 1 and session.can_follow(started):
            draws = self._draws(pending)
            self._ahead = session.follow(started, self._exit, self._sampling, draws)
            self._unused = dict(enumerate(draws))
        choice = session.finish(started)
        self._followed = [[token] for token in choice.tokens]
        return [
            [Chosen(token, blocks_run)] if ids else []
            for token, blocks_run, ids in zip(
                choice.tokens, choice.blocks_run, pending, strict=True
            )
        ]

    def end(self) -> None:
        """See `Decoder`."""
        if self._ahead is not None:
            for row, length in enumerate(self._ahead.lengths):
                self._session.rewind(length - 1, row)
            self._ahead = None

    def _draws(self, pending: Sequence[Sequence[int]]) -> list[float]:
        """Each sequence's next random number; one that was drawn ahead and not used comes first.

        None at all where tokens aren't sampled.
        """
        if not self._sampling.temperature:
            return []
        draws = [0.0] * len(pending)
        for row in (row for row, ids in enumerate(pending) if ids):
            known = self._unused.pop(row, None)
            draws[row] = self._sampling.draw(self._generators[row]) if known is None else known
        return draws


class StepWithLogits:
    """One token per step, chosen from logits on the host: penalties, biases, log probabilities.

    Args:
        session: With a sequence for each generator.
        exit: A fixed exit, or the policy that decides.
        options: How tokens are chosen.
        generators: Random numbers of each sequence.
        prompts: Token ids of each sequence.
    """

    def __init__(
        self,
        session: Session,
        exit: Exit | ExitPolicy,
        options: GenerationOptions,
        generators: Sequence[np.random.Generator],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._session, self._exit, self._generators = session, exit, generators
        self._sampling = options.sampling
        self._processors = [LogitsProcessor(options, list(prompt)) for prompt in prompts]

    def step(self, pending: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[list[Chosen]]:
        """See `Decoder`."""
        blocks_run: list[int]
        if isinstance(self._exit, ExitPolicy):
            step = self._session.decide(pending, self._exit)
            logits, blocks_run = step.logits, step.blocks_run.tolist()
        else:
            logits = self._session.advance(pending, self._exit)
            depth = resolve_exit(self._exit, self._session.spec.blocks, self._session.exits)
            blocks_run = [depth] * len(logits)
        return [
            [self._choose(row, logits[row], blocks_run[row])] if ids else []
            for row, ids in enumerate(pending)
        ]

    def end(self) -> None:
        """See `Decoder`: nothing is begun ahead."""

    def _choose(self, row: int, logits: Float32, blocks_run: int) -> Chosen:
        processor = self._processors[row]
        token = self._sampling.choose(processor.adjust(logits), self._generators[row])
        processor.push(token)
        return Chosen(token, blocks_run, logprobs=processor.logprobs(logits, token))
