"""Launching passes: those that the scheduler chose, and those that certainly follow one.

Where the model runs on a device, a pass is launched when it is certain, not when the tokens before
it have been handed out: the device goes on while the host is busy with those.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ojfa_export.backends.backend import AsksExitsTogether
from ojfa_export.backends.checks import checking
from ojfa_export.backends.draft import Drafts
from ojfa_export.decoding.arrays import Hidden
from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.decoding.sampling import GREEDY
from ojfa_export.engine.checked_heads import run_checked, run_heads_after
from ojfa_export.engine.costs import PassCosts
from ojfa_export.engine.heads import (
    ChainHeads,
    Heads,
    ask_for_one_token,
    head_request,
    run_heads,
)
from ojfa_export.engine.next_step import NextStep
from ojfa_export.engine.running import Running
from ojfa_export.engine.scheduler import Work
from ojfa_export.engine.stats import Counts
from ojfa_export.runtime.runner import ModelRunner


@dataclass(slots=True)
class Launched:
    """A pass that was launched; what it says may be on its way.

    Attributes:
        running: Whose tokens.
        steps: What each of them gets an output to; None where a prompt goes on.
        entry: The first block that runs.
        depth: Blocks that its tokens run to.
        tokens: That it runs, in a block on average.
        beside: Requests of the pass whose long prompts do not run in it, and tokens of prompts that
            do.
        at: When it was launched, by `time.perf_counter`.
        heads: Their outputs; None where nobody gets one.
        chosen: What chooses the token of each, in their order, if one output does.
        ended: Whether it has been waited for.
    """

    running: list[Running]
    steps: list[NextStep | None]
    entry: int
    depth: int
    tokens: float
    beside: tuple[int, int]
    at: float = 0.0
    heads: Heads | None = None
    chosen: HeadOutput | None = None
    ended: bool = False


class Foreseen(NamedTuple):
    """What comes next of a request, whatever its next token is.

    Attributes:
        running: The request.
        step: What it needs then.
        stand_in: An id that names the token in the next pass.
    """

    running: Running
    step: NextStep
    stand_in: int


class Launcher:
    """Launches passes of one cache.

    Args:
        runner: Of the sequences.
        costs: Learn what passes take.
        counts: Of passes and their tokens.
    """

    def __init__(self, runner: ModelRunner, costs: PassCosts, counts: Counts) -> None:
        self._runner, self._engines = runner, runner.engines
        self._costs, self._counts = costs, counts
        # When the last output came, and whether something ran since that nobody waited for.
        self._answered_at, self._unmeasured = 0.0, False

    @property
    def goes_ahead(self) -> bool:
        """Whether passes run beside the host, so that it pays to launch them early."""
        return self._engines.follows

    def launch(self, work: Work, before: Sequence[Launched] = ()) -> list[Launched]:
        """Launches what was chosen.

        Args:
            work: What runs.
            before: What was launched last, if the host has not seen it: see `foresee`.

        Returns:
            Where all run to one depth, one pass; else those that each head answers, of the same
            work.
        """
        tokens, steps = self._count(work), work.steps
        if len(set(work.depths)) > 1:
            return self._launch_each(work, steps, tokens)
        depth = work.depths[0]
        launched = Launched(work.running, steps, work.entry, depth, tokens, work.beside)
        # The device has a short way where just the same decode on.
        same = len(before) == 1 and before[0].running == work.running and not work.prompts
        self._launch(launched, work.stops, before[0].chosen if same else None)
        return [launched]

    def draft(self, running: list[Running]) -> list[Launched]:
        """Launches the draft layer after the newest tokens of requests that wait for it.

        Where a device makes them one after the other, all drafts of those that begin.
        """
        drafter = self._runner.drafter
        assert drafter is not None
        chained: list[Running] = []
        chain: Drafts | None = None
        if drafter.chains:
            chained = [each for each in running if each.step.drafts > 1]
            sequences = [each.sequence for each in chained]
            if chained and drafter.room(sequences) > 1:
                chain = drafter.chain(sequences, max(each.step.drafts for each in chained))
        launched = []
        if chain is not None:
            launched.append(self._drafted(chained, ChainHeads(chain)))
            running = [each for each in running if each not in chained]
        if running:
            hidden = drafter.run([each.sequence for each in running])
            heads = run_heads(drafter.engines, hidden, 0, [each.step for each in running])
            launched.append(self._drafted(running, heads))
        return launched

    def _drafted(self, running: list[Running], heads: Heads) -> Launched:
        self._unmeasured = True  # the next pass waits for this too
        steps, count = [each.step for each in running], len(running)
        return Launched(running, [*steps], 0, 0, count, (count, 0), heads=heads, ended=True)

    def wait(self, launched: Launched) -> None:
        """Waits for the answers of a pass, and learns what it took; once."""
        if launched.ended:
            return
        launched.ended = True
        if launched.heads is not None:
            launched.heads.wait()
        elif self.goes_ahead:
            self._unmeasured = True  # it may not even have begun
            return
        now = time.perf_counter()
        if not self._unmeasured:
            seconds = now - max(launched.at, self._answered_at)
            blocks = launched.depth - launched.entry
            self._costs.learn(launched.tokens, seconds, blocks)
            self._costs.pieces.learn(*launched.beside, seconds / blocks)
        self._answered_at, self._unmeasured = now, False

    def _launch(
        self,
        launched: Launched,
        stops: Sequence[int] | None,
        following: HeadOutput | None = None,
    ) -> None:
        """Runs the sequences to the depth, and runs the head there on what they want to know."""
        launched.at = time.perf_counter()
        runner, depth = self._runner, launched.depth
        sequences = [each.sequence for each in launched.running]
        steps = [step for step in launched.steps if step is not None]
        checked = self._is_checked(steps)
        if len(steps) == len(sequences) and ask_for_one_token(steps) and not checked:
            # As a rule: a device has a short way for that.
            output = runner.choose(sequences, depth, head_request(steps), following)
            launched.heads = Heads(output)
            launched.chosen = output if runner.run_together(sequences) else None
            return
        if len(steps) == len(sequences) and _check(steps, depth == runner.spec.blocks):
            output = runner.check(sequences, [step.rows for step in steps])
            launched.heads = Heads(output)
            return
        counts = [0 if step is None else step.rows for step in launched.steps]
        hidden = runner.run(sequences, depth, counts, following, stops)
        if steps:
            launched.heads = self._run_heads(hidden, steps)

    def _launch_each(
        self, work: Work, steps: list[NextStep | None], tokens: float
    ) -> list[Launched]:
        """Runs each sequence to its own depth, and runs the heads there."""
        at, runner = time.perf_counter(), self._runner
        sequences = [each.sequence for each in work.running]
        counts = [0 if step is None else step.rows for step in steps]
        there = runner.run_each(sequences, work.depths, counts, work.stops)
        depth = work.entry + work.blocks
        whole = Launched(work.running, steps, work.entry, depth, tokens, work.beside, at)
        launched: list[Launched] = []
        for group, hidden in self._by_head(there, work.depths):
            some = [step for index in group if (step := steps[index]) is not None]
            running, heads = [work.running[i] for i in group], self._run_heads(hidden, some)
            # One wait measures what all of them took.
            ended = bool(launched)
            launched.append(
                replace(whole, running=running, steps=[*some], heads=heads, ended=ended)
            )
        return launched or [whole]

    def _by_head(
        self, there: Sequence[tuple[list[int], Hidden]], depths: Sequence[int]
    ) -> list[tuple[list[int], Hidden]]:
        """Indices of those that one call of a head answers, and their hidden states."""
        groups: dict[int, list[tuple[list[int], Hidden]]] = {}
        blocks, together = self._runner.spec.blocks, isinstance(self._engines, AsksExitsTogether)
        for part in there:
            depth = depths[part[0][0]]
            groups.setdefault(0 if together and depth < blocks else depth, []).append(part)
        concatenate = self._runner.executor.arrays.concatenate
        return [
            (
                [index for indices, _ in parts for index in indices],
                parts[0][1] if len(parts) == 1 else concatenate([hidden for _, hidden in parts]),
            )
            for parts in groups.values()
        ]

    def _run_heads(self, hidden: Hidden, steps: Sequence[NextStep]) -> Heads:
        engines, checks = self._engines, checking(self._engines)
        if checks is not None and self._is_checked(steps):
            return run_checked(engines, checks, hidden, steps)
        return run_heads_after(engines, hidden, steps)

    def _is_checked(self, steps: Sequence[NextStep]) -> bool:
        """Whether a check head says how sure any of them is."""
        return checking(self._engines) is not None and any(step.check is not None for step in steps)

    def _count(self, work: Work) -> float:
        """Tokens that a block of this work runs, on average; counts what runs."""
        tokens = block_tokens = late = 0
        for each, depth, stop in zip(work.running, work.depths, work.stops, strict=True):
            marks = each.sequence.marks
            new = stop - marks[depth - 1]
            tokens += new
            block_tokens += new * (depth - work.entry)
            late += max(0, min(stop, marks[0]) - marks[depth - 1] - 1)
        self._counts.passes += 1
        self._counts.pass_tokens += tokens
        self._counts.catch_up_tokens += late
        return block_tokens / work.blocks


def _check(steps: Sequence[NextStep], full: bool) -> bool:
    """Whether all ask what is likeliest at full depth, as where drafts are checked."""
    return full and all(step.sampling is GREEDY and not step.logits for step in steps)


def foresee(before: Sequence[Launched]) -> list[Foreseen] | None:
    """What comes next of those that get a token of passes that nobody has seen.

    A device has the tokens as soon as they are chosen; the next pass names them by stand-ins.

    Returns:
        None where it depends on the tokens what runs next.
    """
    foreseen = []
    for launched in before:
        if launched.heads is None:
            continue
        rows = zip(launched.running, launched.steps, strict=True)
        getting = [each for each, asked in rows if asked is not None]
        steps = [each.foresee() for each in getting]
        if None in steps:
            return None
        stand_ins = launched.heads.output.stand_ins()
        for each, step, stand_in in zip(getting, steps, stand_ins, strict=True):
            if step is not None and not each.over:
                foreseen.append(Foreseen(each, step, stand_in))
    return foreseen
