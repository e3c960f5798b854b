"""A step on its way: the heads that are asked in turn, and where each sequence stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.choice import Choices, Choosing, OneToken, Stop
from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.runtime.sampling import Sampling
from ojfa_export.runtime.stats import Stats

C = TypeVar("C", bound=Choices)


@dataclass(slots=True)
class Stage:
    """A head that a step asks.

    Attributes:
        depth: Blocks run before it.
        stop: Of an exit that is checked; None for the last stage, where every sequence stops.
    """

    depth: int
    stop: Stop | None = None


@lru_cache(maxsize=64)
def stages_of(policy: ExitPolicy, blocks: int) -> tuple[Stage, ...]:
    """A policy's exits, and the model's own head.

    Raises:
        UsageError: The exits don't fit a model with this many blocks.
    """
    policy.check_fits(blocks)
    depths = (*policy.exits, blocks)
    checked = [
        Stage(depth, Stop(policy.measure, threshold, range(depth, after)))
        for depth, after, threshold in zip(depths, depths[1:], policy.thresholds, strict=False)
    ]
    return (*checked, Stage(blocks))


@dataclass(slots=True)
class Asked(Generic[C]):
    """A head that was asked about some rows; the answer may be on its way."""

    stage: Stage
    rows: list[int]
    choices: C


@dataclass(slots=True)
class Taken(Generic[C]):
    """The answer that a sequence stopped at: a row of a head's choices, after so many blocks."""

    choices: C
    index: int
    depth: int


class Started(Generic[C]):
    """A step whose depth and tokens may not be known yet.

    Args:
        stages: Heads to ask in turn.
        wanted: Sequences with new tokens.
        lengths: Tokens of each sequence, the new ones included.
        sampling: How tokens are chosen.
        draws: A number from [0, 1) for each sequence where they are sampled, else none.

    Attributes:
        going: [sequences] those that no head was sure of.
        rows: The same as numbers.
        together: Their newest tokens on their way, as long as all sequences go on and nothing else
            waits where they come.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        wanted: Sequence[bool],
        lengths: list[int],
        sampling: Sampling,
        draws: Sequence[float],
    ) -> None:
        self.stages, self.lengths = stages, lengths
        self.going = list(wanted)
        self.rows = [row for row, each in enumerate(wanted) if each]
        self.together: OneToken | None = None
        self._sampling, self._draws = sampling, draws
        self._asked: list[Asked[C]] = []
        self._said: list[list[float]] = []  # of the heads that were judged
        self._taken: list[Taken[C] | None] = [None] * len(self.going)

    @property
    def next_stage(self) -> Stage:
        """The head to ask next."""
        return self.stages[len(self._asked)]

    @property
    def last(self) -> Asked[C] | None:
        """The head that was asked last, if any."""
        return self._asked[-1] if self._asked else None

    @property
    def decided(self) -> bool:
        """Whether it is known where each sequence stops."""
        return not self.rows or len(self._asked) == len(self.stages)

    @property
    def judged(self) -> bool:
        """Whether the confidence of every head that was asked is known."""
        return len(self._said) == len(self._asked)

    def how(self, stage: Stage) -> Choosing:
        """How the sequences that go on choose at a stage."""
        draws = [self._draws[row] for row in self.rows] if self._draws else ()
        return Choosing(self._sampling, draws, stage.stop)

    def add(self, stage: Stage, choices: C) -> None:
        """Takes what a stage's head was asked about the sequences that go on."""
        self._asked.append(Asked(stage, self.rows, choices))

    def judge(self) -> None:
        """Waits for the confidence of the head that was asked last; who is sure stops there."""
        asked = self._asked[-1]
        stop, rows = asked.stage.stop, asked.rows
        assert stop is not None
        said = asked.choices.confidence(stop.measure)
        self._said.append(said)
        sure = [at for at, each in enumerate(said) if each >= stop.threshold]
        for at in sure:
            row = rows[at]
            self._taken[row] = Taken(asked.choices, at, asked.stage.depth)
            self.going[row] = False
        if sure:
            self.rows = [row for row in rows if self.going[row]]

    def taken(self) -> list[Taken[C] | None]:
        """Once it is decided, what each sequence stopped at; None without new tokens."""
        taken = self._taken.copy()
        if self.rows:
            last = self._asked[-1]
            for at, row in enumerate(last.rows):
                taken[row] = Taken(last.choices, at, last.stage.depth)
        return taken

    def confidence(self) -> NDArray[np.float64]:
        """What each exit said of each sequence, [exits, sequences]; NaN where none was asked."""
        table = np.empty((len(self.stages) - 1, len(self.going)))
        if len(table):
            table.fill(np.nan)
        for line, asked, said in zip(table, self._asked, self._said, strict=False):
            line[asked.rows] = said
        return table

    def count(self, stats: Stats, blocks: int) -> None:
        """Counts the heads that were asked, of a model with this many blocks."""
        for asked in self._asked:
            stats.count_head(len(asked.rows), final=asked.stage.depth == blocks)
        for asked, said in zip(self._asked, self._said, strict=False):
            stats.checks += len(asked.rows)
            assert asked.stage.stop is not None
            stopped = [each for each in said if each >= asked.stage.stop.threshold]
            if stopped:
                stats.count_stopped(asked.stage.depth, len(stopped), sum(stopped))
