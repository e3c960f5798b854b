"""Launching passes: those that the scheduler chose, and those that certainly follow one.

Where the model runs on a device, a pass is launched when it is certain, not when the tokens before
it have been handed out: the device goes on while the host is busy with those.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.engine.asks import Ask
from ojfa_export.engine.costs import PassCosts
from ojfa_export.engine.heads import Heads, ask_heads, head_request, one_sampling
from ojfa_export.engine.running import Running
from ojfa_export.engine.stats import Counts
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import expecting


@dataclass(slots=True)
class Launched:
    """A pass that was launched; what it says may be on its way.

    Attributes:
        running: Whose tokens.
        asks: What each of them gets an answer to; None where a prompt goes on.
        entry: The first block that runs.
        depth: Blocks that its tokens run to.
        tokens: That it runs.
        at: When it was launched, by `time.perf_counter`.
        heads: The answers; None where nobody gets one.
        chosen: What chooses the token of each, in their order, if one output does.
        ended: Whether it has been waited for.
    """

    running: list[Running]
    asks: list[Ask | None]
    entry: int
    depth: int
    tokens: int
    at: float = 0.0
    heads: Heads | None = None
    chosen: HeadOutput | None = None
    ended: bool = False


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
        # When the last answer came, and whether something ran since that nobody waited for.
        self._answered_at, self._unmeasured = 0.0, False

    @property
    def goes_ahead(self) -> bool:
        """Whether passes run beside the host, so that it pays to launch them early."""
        return self._engines.follows

    def launch(self, running: list[Running], stops: Sequence[int], depth: int) -> Launched:
        """Launches a pass.

        Args:
            running: Whose tokens.
            stops: One past the last token of each that runs.
            depth: Blocks to run.
        """
        asks = [
            each.ask if each.ask.depth == depth and stop == len(each.sequence) else None
            for each, stop in zip(running, stops, strict=True)
        ]
        entry, tokens = running[0].entry, self._count(running, depth, stops)
        launched = Launched(running, asks, entry, depth, tokens)
        self._launch(launched, stops)
        return launched

    def follow(self, before: Launched) -> Launched | None:
        """Launches the pass that follows another whatever its tokens are, before they are seen.

        Those of its requests go on that have not ended, and will not with the next token. Where all
        do, the device has their tokens as soon as they are chosen. A request that ends on its token
        after all is left one token ahead, which is dropped; the others' are right.

        Returns:
            None where that depends on the tokens, or none go on.
        """
        going = _going_on(before)
        following, tokens = before.chosen, None
        if following is None or len(going) < len(before.running):
            following = None
            if going:
                self.wait(before)
                going, tokens = _with_tokens(before, going)
        if not going:
            return None
        running = [before.running[row] for row, _ in going]
        self._counts.passes += 1
        self._counts.pass_tokens += len(running)
        launched = Launched(running, [ask for _, ask in going], 0, before.depth, len(running))
        with expecting([each.sequence for each in running], tokens):
            self._launch(launched, None, following)
        return launched

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
            self._costs.learn(launched.tokens, seconds, launched.depth - launched.entry)
        self._answered_at, self._unmeasured = now, False

    def _launch(
        self,
        launched: Launched,
        stops: Sequence[int] | None,
        following: HeadOutput | None = None,
    ) -> None:
        """Runs the sequences to the depth, and asks the head there what they want to know."""
        launched.at = time.perf_counter()
        runner, depth = self._runner, launched.depth
        sequences = [each.sequence for each in launched.running]
        asks = [ask for ask in launched.asks if ask is not None]
        sampling = one_sampling(asks) if len(asks) == len(sequences) else None
        if sampling is not None:
            # One token of each, as a rule: a device has a short way for that.
            request = head_request(sampling, asks)
            output = runner.choose(sequences, depth, request, following)
            launched.heads = Heads({sampling: output})
            launched.chosen = output if runner.run_together(sequences) else None
            return
        counts = [0 if ask is None else ask.rows for ask in launched.asks]
        hidden = runner.run(sequences, depth, counts, following, stops)
        if asks:
            launched.heads = ask_heads(self._engines, hidden, depth, asks)

    def _count(self, running: Sequence[Running], depth: int, stops: Sequence[int]) -> int:
        """Tokens that the deepest block of a pass runs; counts them."""
        tokens = late = 0
        for each, stop in zip(running, stops, strict=True):
            marks = each.sequence.marks
            tokens += stop - marks[depth - 1]
            late += max(0, min(stop, marks[0]) - marks[depth - 1] - 1)
        self._counts.passes += 1
        self._counts.pass_tokens += tokens
        self._counts.catch_up_tokens += late
        return tokens


def _going_on(before: Launched) -> list[tuple[int, Ask]]:
    """Rows of a pass that go on whatever its tokens are, and with what; none where that depends."""
    going = []
    for row, (each, answered) in enumerate(zip(before.running, before.asks, strict=True)):
        if each.request.done:
            continue
        ask = each.foresee()
        if ask is None or ask.depth != before.depth or answered is None:
            return []
        if not each.is_at_last_token:
            going.append((row, ask))
    return going


def _with_tokens(
    before: Launched, going: list[tuple[int, Ask]]
) -> tuple[list[tuple[int, Ask]], list[int]]:
    """The same with the tokens of the pass, once they are known; those that end are left out."""
    kept, tokens = [], []
    for row, ask in going:
        answered = before.asks[row]
        assert before.heads is not None
        assert answered is not None
        token = before.heads.token(row, answered.sampling, answered.draw)
        if not before.running[row].ends_with(token):
            kept.append((row, ask))
            tokens.append(token)
    return kept, tokens
