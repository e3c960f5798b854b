"""Running a step: head after head, and the step after it before its tokens are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ojfa_export.backends.checks import checking
from ojfa_export.backends.choice import check_on_host
from ojfa_export.decoding.head_output import HeadOutput, HostHeadOutput
from ojfa_export.decoding.sampling import GREEDY, Sampling
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence as TokenSequence
from ojfa_export.runtime.sequence import expecting
from ojfa_export.runtime.steps import Row, Stage, Step


class StepRunner:
    """Runs steps of a batch.

    Args:
        runner: Of the sequences.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def with_logits(
        self, sequences: Sequence[TokenSequence], stages: tuple[Stage, ...]
    ) -> Step[HostHeadOutput]:
        """A step whose heads give logits on the host, run to its end.

        Args:
            sequences: With new tokens.
            stages: Heads to ask in turn.
        """
        step: Step[HostHeadOutput] = Step([Row(sequence, stages) for sequence in sequences], GREEDY)
        while not step.decided:
            stage, engines = step.next_stage, self._runner.engines
            hidden, request = self._runner.run(step.sequences, stage.depth), step.request(stage)
            checks = None if stage.check is None else checking(engines)
            if checks is not None:
                step.add(stage, check_on_host(engines, checks, hidden, stage.depth, request))
            else:
                step.add(stage, HostHeadOutput(engines.logits(hidden, stage.depth), request))
            if stage.check is not None:
                step.judge()
        return step

    def start(
        self,
        sequences: Sequence[TokenSequence],
        stages: tuple[Stage, ...],
        sampling: Sampling,
        draws: Sequence[float],
    ) -> Step[HeadOutput]:
        """Begins a step: its first head is asked.

        Args:
            sequences: With new tokens.
            stages: Heads to ask in turn.
            sampling: How tokens are chosen.
            draws: By slot, a number from [0, 1) where they are sampled.
        """
        step = _new_step(sequences, stages, sampling, draws)
        if step.rows:
            self._ask(step)
        return step

    def follow(
        self,
        before: Step[HeadOutput],
        stages: tuple[Stage, ...],
        sampling: Sampling,
        draws: Sequence[float],
    ) -> Step[HeadOutput]:
        """Begins the step after a step in which all stopped at one head, whose tokens come."""
        assert before.last is not None
        sequences = [row.sequence for row in before.rows]
        with expecting(sequences):
            step = _new_step(sequences, stages, sampling, draws)
            self._ask(step, after=before.last.chosen)
        return step

    def stop_together(self, step: Step[HeadOutput]) -> bool:
        """Whether all sequences of a step stop at one head; waits until that is known."""
        self.settle(step)
        return step.last is not None and len(step.last.rows) == len(step.rows)

    def settle(self, step: Step[HeadOutput]) -> None:
        """Goes on with a step until it is known where each sequence stops."""
        while not step.decided:
            going, prepared = step.going, None
            if not step.judged:
                # What may follow is looked up while the answer is on its way.
                stage = step.next_stage
                if self._runner.keeps(stage.depth):
                    prepared = self._runner.prepare(
                        step.sequences, stage.depth, step.request(stage)
                    )
                step.judge()
            if step.going:
                self._ask(step, prepared if step.going is going else None)

    def _ask(
        self,
        step: Step[HeadOutput],
        prepared: Callable[[], HeadOutput] | None = None,
        after: HeadOutput | None = None,
    ) -> None:
        """Runs the sequences that go on to the next head, and asks it."""
        stage = step.next_stage
        if prepared is None:
            output = self._runner.choose(step.sequences, stage.depth, step.request(stage), after)
        else:
            output = prepared()
        step.add(stage, output)


def _new_step(
    sequences: Sequence[TokenSequence],
    stages: tuple[Stage, ...],
    sampling: Sampling,
    draws: Sequence[float],
) -> Step[HeadOutput]:
    rows: list[Row[HeadOutput]] = [
        Row(sequence, stages, draws[sequence.slot] if draws else 0.0) for sequence in sequences
    ]
    return Step(rows, sampling)
