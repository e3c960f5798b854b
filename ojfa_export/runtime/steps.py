"""One step of some sequences: from exit to exit until a head is confident, or the last is reached.

This is the one loop behind fixed exits, exits that decide, and steps that begin before the tokens
before them are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar, cast

from ojfa_export.decoding.check_output import CheckOutput
from ojfa_export.decoding.head_output import ExitCheck, HeadOutput, HeadRequest
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.runtime.sequence import Sequence as TokenSequence
from ojfa_export.runtime.stats import Stats

C = TypeVar("C", bound=HeadOutput)


@dataclass(frozen=True, slots=True)
class Stage:
    """A head that a step asks.

    Attributes:
        depth: Blocks run before it.
        check: Of an exit that is checked; None for the last stage, where every sequence stops.
    """

    depth: int
    check: ExitCheck | None = None


@lru_cache(maxsize=64)
def stages_of(
    policy: ExitPolicy, blocks: int, served: tuple[int, ...] | None = None
) -> tuple[Stage, ...]:
    """A policy's exits, and the model's own head.

    Args:
        policy: The policy.
        blocks: Of the model.
        served: The exits that there are; None for all.

    Raises:
        UsageError: The exits don't fit a model with this many blocks, or there are none such.
    """
    policy.check_fits(blocks, served)
    depths = (*policy.exits, blocks)
    checked = [
        Stage(depth, ExitCheck(policy.measure, threshold, range(depth, after)))
        for depth, after, threshold in zip(depths, depths[1:], policy.thresholds, strict=False)
    ]
    return (*checked, Stage(blocks))


@dataclass(slots=True)
class Row(Generic[C]):
    """A sequence in a step.

    Attributes:
        sequence: The sequence, its new tokens included.
        stages: Heads to ask in turn.
        draw: A number from [0, 1), where the token is sampled.
        confidence: What each exit that was checked said.
        output: The head that it stopped at, once that is known; else None.
        index: Its row there.
        depth: Blocks that it ran.
    """

    sequence: TokenSequence
    stages: tuple[Stage, ...]
    draw: float = 0.0
    confidence: list[float] = field(default_factory=list)
    output: C | None = None
    index: int = 0
    depth: int = 0

    @property
    def next_stage(self) -> Stage:
        """The head to ask next."""
        return self.stages[len(self.confidence)]


@dataclass(slots=True)
class PendingOutput(Generic[C]):
    """A head that was asked about the newest tokens of some rows; the answer may be on its way.

    Attributes:
        stage: Where.
        rows: Whose tokens, in the order of the output's rows.
        output: The answer; of a check head, only how sure it is.
        stopped: The rows that stopped here, once that is known.
        left: Where a check head was asked, what the whole head said of those.
    """

    stage: Stage
    rows: list[Row[C]]
    output: C | CheckOutput
    stopped: list[Row[C]] = field(default_factory=list)
    left: C | None = None

    @property
    def chosen(self) -> C:
        """What chooses the tokens of all rows, where all have stopped here."""
        return cast("C", self.output if self.left is None else self.left)

    def judge(self) -> list[Row[C]]:
        """Waits for the answer of an exit that is checked; who is confident stops there.

        Where a check head was asked, the whole head is, at once, about those that stop.

        Returns:
            The rows that go on.
        """
        check = self.stage.check
        if check is None:
            self.stop()
            return []
        said = self.output.confidence(check.measure)
        going, stopping = [], []
        for index, (row, confidence) in enumerate(zip(self.rows, said, strict=True)):
            row.confidence.append(confidence)
            if confidence >= check.threshold:
                stopping.append(index)
            else:
                going.append(row)
        self._stop(stopping)
        return going

    def stop(self) -> None:
        """Lets all rows stop here."""
        self._stop(range(len(self.rows)))

    def _stop(self, indices: Sequence[int]) -> None:
        output, places = self.output, indices
        if isinstance(output, CheckOutput):
            if not indices:
                return
            # Where steps have logits, those are what their heads give: so is this.
            output = self.left = cast("C", output.leave(indices))
            places = range(len(indices))
        for index, place in zip(indices, places, strict=True):
            row = self.rows[index]
            row.output, row.index, row.depth = output, place, self.stage.depth
            self.stopped.append(row)

    def count(self, stats: Stats, blocks: int) -> None:
        """Counts the rows that the head was asked about, and those that stopped."""
        asked = self.stopped if isinstance(self.output, CheckOutput) else self.rows
        stats.count_head(len(asked), final=self.stage.depth == blocks)
        if self.stage.check is None:
            return
        stats.checks += len(self.rows)
        if self.stopped:
            sure = [row.confidence[-1] for row in self.stopped]
            stats.count_stopped(self.stage.depth, len(sure), sum(sure))


class Step(Generic[C]):
    """A step whose depth and tokens may not be known yet.

    Args:
        rows: Sequences with new tokens, all with the same stages.
        sampling: How tokens are chosen.

    Attributes:
        rows: As given.
        going: Those that no head was confident about.
        lengths: Tokens of each row's sequence, the new ones included.
    """

    def __init__(self, rows: list[Row[C]], sampling: Sampling) -> None:
        self.rows = self.going = rows
        self.lengths = [len(row.sequence) for row in rows]
        self._sampling = sampling
        self._asked: list[PendingOutput[C]] = []
        self._judged = 0

    @property
    def next_stage(self) -> Stage:
        """The head to ask next."""
        return self.rows[0].stages[len(self._asked)]

    @property
    def last(self) -> PendingOutput[C] | None:
        """The head that was asked last, if any."""
        return self._asked[-1] if self._asked else None

    @property
    def decided(self) -> bool:
        """Whether it is known where each row stops."""
        return not self.going or len(self._asked) == len(self.rows[0].stages)

    @property
    def judged(self) -> bool:
        """Whether the confidence of every head that was asked is known."""
        return self._judged == len(self._asked)

    @property
    def sequences(self) -> list[TokenSequence]:
        """The sequences that go on."""
        return [row.sequence for row in self.going]

    def request(self, stage: Stage) -> HeadRequest:
        """How the sequences that go on choose at a stage."""
        draws = [row.draw for row in self.going] if self._sampling.temperature else ()
        return HeadRequest(self._sampling, draws, stage.check)

    def add(self, stage: Stage, output: C | CheckOutput) -> None:
        """Takes what a stage's head was asked about the rows that go on."""
        self._asked.append(PendingOutput(stage, self.going, output))

    def judge(self) -> None:
        """Waits for the confidence of the head that was asked last; who is confident stops."""
        going = self._asked[-1].judge()
        self._judged += 1
        if len(going) < len(self.going):
            self.going = going

    def finish(self, stats: Stats, blocks: int) -> None:
        """Once it is decided: the rest stops at the last head; counts everything."""
        if self.going:
            self._asked[-1].stop()
        for asked in self._asked:
            asked.count(stats, blocks)
        for row in self.rows:
            stats.exits[row.depth] += 1
