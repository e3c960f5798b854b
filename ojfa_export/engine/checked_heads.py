"""Asking a check head how sure exits are, and the whole head about those that leave alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.backends.backend import AsksExitsTogether, Engines
from ojfa_export.backends.checks import ChecksExits
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.decoding.confidence import Measure, confidence
from ojfa_export.decoding.head_output import HeadRequest, HostHeadOutput
from ojfa_export.decoding.sampling import GREEDY, Sampling
from ojfa_export.engine.heads import Heads
from ojfa_export.engine.next_step import NextStep

# In place of the token of a row that goes on, which nobody asks for.
NO_TOKEN = -1


class CheckedHeads(Heads):
    """What is known of the rows of a pass: how sure, of those that were checked, and the tokens.

    Args:
        sure: By row, the confidence of those that were checked, in the measure that they asked.
        output: Of the rows that the whole head was asked about, in their order.
        places: Of each row, which one of the output it is; `NO_TOKEN` for rows that go on.
    """

    def __init__(
        self, sure: dict[int, float], output: HostHeadOutput, places: Sequence[int]
    ) -> None:
        super().__init__(output)
        self._logits_of = output.logits
        self._sure, self._places = sure, places
        self._rows: list[int] | None = None

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits; `NO_TOKEN` for rows that go on."""
        if self._rows is None:
            given = super().likeliest() if len(self._logits_of) else []
            self._rows = [NO_TOKEN if place < 0 else given[place] for place in self._places]
        return self._rows

    def confidence(self, measure: Measure) -> list[float]:
        """How confident the check head is of each row that was checked; NaN of the others."""
        return [self._sure.get(row, float("nan")) for row in range(len(self._places))]

    def token(self, row: int, sampling: Sampling, draw: float) -> int:
        """See `Heads`."""
        if sampling is GREEDY:
            return self.likeliest()[row]
        return sampling.pick(self._logits_of[self._places[row]], draw)

    def logits(self, row: int, rows: int) -> Float32:
        """See `Heads`."""
        first = self._places[row]
        return self._logits_of[first : first + rows]


def run_checked(
    engines: Engines, checks: ChecksExits, hidden: Hidden, steps: Sequence[NextStep]
) -> CheckedHeads:
    """Asks the check head about what is checked, and the whole head about all that gets a token.

    Args:
        engines: The opened engines, whose hidden states are on the host.
        checks: The same.
        hidden: [sum of rows, H], step by step; after as many blocks as each step says, which are
            as many for all unless the engines ask exits together.
        steps: Of each request; one that is checked asks one row.
    """
    rows = [step for step in steps for _ in range(step.rows)]
    asked = [row for row, step in enumerate(rows) if step.check is not None]
    sure = _sure(checks, hidden, rows, asked)
    whole = [
        row
        for row, step in enumerate(rows)
        if step.check is None or sure[row] >= step.check.threshold
    ]
    logits = np.zeros((0, 0), np.float32)
    if whole:
        logits = logits_after(engines, hidden[whole], [rows[row].depth for row in whole])
    places = {row: place for place, row in enumerate(whole)}
    output = HostHeadOutput(logits, HeadRequest())
    return CheckedHeads(sure, output, [places.get(row, NO_TOKEN) for row in range(len(rows))])


def _sure(
    checks: ChecksExits, hidden: Hidden, rows: Sequence[NextStep], asked: Sequence[int]
) -> dict[int, float]:
    """How sure the check head is of some rows, each in the measure that its step asks."""
    logits = checks.check_logits(hidden[asked], [rows[row].depth for row in asked])
    by_measure: dict[Measure, list[int]] = {}
    for index, row in enumerate(asked):
        check = rows[row].check
        assert check is not None
        by_measure.setdefault(check.measure, []).append(index)
    return {
        asked[index]: value
        for measure, indices in by_measure.items()
        for index, value in zip(indices, confidence(logits[indices], measure).tolist(), strict=True)
    }


def logits_after(engines: Engines, hidden: Hidden, blocks_run: Sequence[int]) -> Float32:
    """Logits of rows [rows, H] after so many blocks each, by one call.

    Args:
        engines: That ask exits together, where the rows come from several.
        hidden: [rows, H].
        blocks_run: [rows].
    """
    if len(set(blocks_run)) == 1:
        return engines.logits(hidden, blocks_run[0])
    assert isinstance(engines, AsksExitsTogether)
    return engines.logits_of_exits(hidden, blocks_run)
