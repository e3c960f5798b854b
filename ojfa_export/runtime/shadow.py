"""Which tokens are compared with the full model, and what came of it.

Each token is chosen with the same probability, whatever it is and wherever it stopped. Of the
chosen, those that ran all blocks agree; the early ones wait until someone completes them. Given
how many of a sequence's tokens were chosen, they are a simple random sample of all its tokens, so
that the share of them that differs has the sequence's true share as its mean, and lies in [0, 1]:
just what `runtime.disagreement.DisagreementMonitor` takes. (It is the Horvitz-Thompson estimate, in
which each chosen token stands for 1 / probability others, with the total known by its sample size.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ojfa_export.decoding.events import ShadowCheck
from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import real_number


@dataclass(frozen=True)
class PendingCheck:
    """A chosen early token that waits for its comparison.

    Attributes:
        row: Which sequence.
        position: Of the token that it follows, from 0.
        blocks_run: Where it stopped.
        choice: The exit's likeliest token.
    """

    row: int
    position: int
    blocks_run: int
    choice: int


class Shadow:
    """Chooses tokens of one session's sequences.

    Args:
        share: The probability that a token is chosen, above 0 and at most 1.
        generator: Random numbers, apart from those of sampling: checks change no token.

    Raises:
        UsageError: A share out of range.

    """

    def __init__(self, share: float, generator: np.random.Generator) -> None:
        self._share = real_number(
            "the share of tokens for shadow checks",
            share,
            0.0,
            1.0,
            above_low=True,
            wanted="above 0 and at most 1",
            hint="one token in ten is 0.1",
        )
        self._generator = generator
        self._due: dict[tuple[int, int], PendingCheck] = {}  # by row and position
        self._agrees: dict[int, dict[int, bool | None]] = {}  # by row, then position; None: due

    @property
    def due(self) -> list[PendingCheck]:
        """The early tokens that are still to be compared, oldest first."""
        return list(self._due.values())

    def choose(self) -> bool:
        """Whether the next token is one of those that are compared."""
        return bool(self._generator.random() < self._share)

    def add(self, due: PendingCheck) -> None:
        """Takes a chosen token that stopped early."""
        self._due[due.row, due.position] = due
        self._agrees.setdefault(due.row, {})[due.position] = None

    def record(self, check: ShadowCheck) -> None:
        """Takes a comparison; one of a token that was due takes it from the list."""
        self._agrees.setdefault(check.row, {})[check.position] = check.agrees
        self._due.pop((check.row, check.position), None)

    def forget(self, row: int, length: int) -> None:
        """Drops what was chosen after the first `length` tokens of a sequence."""
        agrees = self._agrees.get(row, {})
        self._agrees[row] = {at: known for at, known in agrees.items() if at < length}
        dropped = [place for place in self._due if place[0] == row and place[1] >= length]
        for place in dropped:
            del self._due[place]

    def loss(self, row: int) -> float | None:
        """The share of a sequence's chosen tokens that differ.

        Returns:
            None where none was chosen: such a sequence says nothing, and is no unit of a monitor.

        Raises:
            UsageError: Some are still to be compared.
        """
        known = list(self._agrees.get(row, {}).values())
        if None in known:
            raise UsageError(
                f"{known.count(None)} tokens of sequence {row} wait for their shadow checks",
                hint="call session.run_shadow_checks() first",
            )
        return known.count(False) / len(known) if known else None
