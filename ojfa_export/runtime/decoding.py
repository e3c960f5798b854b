"""From what a session computes to the next tokens: one per step at a fixed or a decided exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.runtime.sampling import Sampling
from ojfa_export.runtime.session import Exit, Session


@dataclass(frozen=True)
class Chosen:
    """A token that was chosen.

    Attributes:
        blocks_run: Blocks that computed its logits.
        drafted: Whether speculation proposed it before the full model took it.
    """

    id: int
    blocks_run: int
    drafted: bool = False


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

    def step(self, pending: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[list[Chosen]]:
        """See `Decoder`."""
        draws = [
            self._sampling.draw(generator) if ids else 0.0
            for ids, generator in zip(pending, self._generators, strict=True)
        ]
        choice = self._session.choose(pending, self._exit, self._sampling, draws)
        return [
            [Chosen(choice.tokens[row], choice.blocks_run[row])] if ids else []
            for row, ids in enumerate(pending)
        ]
