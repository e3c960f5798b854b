"""Asking a check head how sure exits are, and the whole head about those that leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ojfa_export.backends.backend import AsksExitsTogether, Engines
from ojfa_export.backends.checks import ChecksExits
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import HeadRequest, HostHeadOutput
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.engine.heads import Heads, run_heads
from ojfa_export.engine.next_step import NextStep

# In place of the token of a row that goes on, which nobody asks for.
NO_TOKEN = -1


class CheckedHeads(Heads):
    """What is known of the rows of a pass: how sure, of those that were checked, and the tokens.

    Args:
        sure: By row, the confidence of those that were checked, in the measure that they asked.
        whole: What the whole head said of the rows that it was asked about, in their order; None
            where there are none.
        places: Of each row, which one of those it is; `NO_TOKEN` for rows that go on.
    """

    def __init__(self, sure: dict[int, float], whole: Heads | None, places: Sequence[int]) -> None:
        self._sure, self._whole, self._places = sure, whole, places
        self._rows: list[int] | None = None

    def wait(self) -> None:
        """Waits until all has been said."""
        if self._whole is not None:
            self._whole.wait()

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits; `NO_TOKEN` for rows that go on."""
        if self._rows is None:
            given = [] if self._whole is None else self._whole.likeliest()
            self._rows = [NO_TOKEN if place < 0 else given[place] for place in self._places]
        return self._rows

    def confidence(self, measure: Measure) -> list[float]:
        """How confident the check head is of each row that was checked; NaN of the others."""
        return [self._sure.get(row, float("nan")) for row in range(len(self._places))]

    def token(self, row: int, sampling: Sampling, draw: float) -> int:
        """See `Heads`."""
        assert self._whole is not None
        return self._whole.token(self._places[row], sampling, draw)

    def logits(self, row: int, rows: int) -> Float32:
        """See `Heads`."""
        assert self._whole is not None
        return self._whole.logits(self._places[row], rows)


def run_checked(
    engines: Engines, checks: ChecksExits, hidden: Hidden, steps: Sequence[NextStep]
) -> CheckedHeads:
    """Asks the check head about what is checked, and the whole head about all that gets a token.

    Args:
        engines: The opened engines.
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
    heads = None
    if whole:
        firsts = accumulate((step.rows for step in steps[:-1]), initial=0)
        leaving = [step for step, row in zip(steps, firsts, strict=True) if row in set(whole)]
        heads = run_heads_after(engines, _rows_of(hidden, whole), leaving)
    places = {row: place for place, row in enumerate(whole)}
    return CheckedHeads(sure, heads, [places.get(row, NO_TOKEN) for row in range(len(rows))])


def run_heads_after(engines: Engines, hidden: Hidden, steps: Sequence[NextStep]) -> Heads:
    """Asks the heads after each step's own blocks what all requests want to know.

    Args:
        engines: That ask exits together, where the rows come from several.
        hidden: [sum of rows, H], step by step.
        steps: Of each request.
    """
    depths = [step.depth for step in steps for _ in range(step.rows)]
    if len(set(depths)) == 1:
        return run_heads(engines, hidden, depths[0], steps)
    assert isinstance(engines, AsksExitsTogether)
    return Heads(HostHeadOutput(engines.logits_of_exits(hidden, depths), HeadRequest()))


def _sure(
    checks: ChecksExits, hidden: Hidden, rows: Sequence[NextStep], asked: Sequence[int]
) -> dict[int, float]:
    """How sure the check head is of some rows, each in the measure that its step asks."""
    said = checks.check(_rows_of(hidden, asked), [rows[row].depth for row in asked])
    measures = {row: check.measure for row in asked if (check := rows[row].check) is not None}
    known = {measure: said.confidence(measure) for measure in set(measures.values())}
    return {row: known[measures[row]][index] for index, row in enumerate(asked)}


def _rows_of(hidden: Hidden, rows: Sequence[int]) -> Hidden:
    """Some rows in rising order; all of them where they lie."""
    return hidden if len(rows) == len(hidden) else hidden[list(rows)]
