"""From what a head says to next tokens: what a session asks, what it gets, and the host's way.

A backend with a device computes the same there, so that a few numbers come to the host, not V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.checks import checking
from ojfa_export.backends.exit_blocks import ExitBlocks
from ojfa_export.backends.passes import Newest, Pass
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.decoding.check_output import CheckOutput
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest, HostHeadOutput


def run_and_choose(
    engines: Chooses,
    executor: Executor,
    step: Pass,
    states: Hidden | None,
    newest: Newest,
    request: HeadRequest,
) -> HeadOutput:
    """What `Engines.prepare` gets ready, by its parts."""
    hidden = newest.hidden if step.tokens is None else executor.embed(step.tokens, step.chunks)
    newest.clear()
    hidden = executor.run(step.blocks, hidden, step.chunks, long_context=step.long_context)
    if states is not None:
        executor.store(states, step.chunks, hidden)
    newest.set(step, hidden)
    return engines.choose(executor.arrays.ascontiguousarray(hidden), step.blocks.stop, request)


class Chooses(Protocol):
    """The part of `Engines` that heads are asked through."""

    def choose(self, hidden: Hidden, blocks_run: int, request: HeadRequest) -> HeadOutput:
        """See `Engines.choose`."""
        ...


class _GivesLogits(Chooses, Protocol):
    def logits(self, hidden: Hidden, blocks_run: int) -> Float32: ...


class PreparesByParts:
    """The part of `Engines` that prepares, for engines that know no shorter way."""

    exit_blocks: ExitBlocks | None = None

    def prepare(
        self: Chooses,
        executor: Executor,
        step: Pass,
        states: Hidden | None,
        newest: Newest,
        request: HeadRequest,
    ) -> Callable[[], HeadOutput]:
        """See `Engines.prepare`."""
        return partial(run_and_choose, self, executor, step, states, newest, request)


class ChoosesOnHost(PreparesByParts):
    """The part of `Engines` that chooses, for engines whose logits are on the host anyway."""

    follows = False

    def choose(
        self: _GivesLogits, hidden: Hidden, blocks_run: int, request: HeadRequest
    ) -> HostHeadOutput | CheckOutput:
        """See `Engines.choose`."""
        checks = checking(self)
        if request.check is None or checks is None:
            return HostHeadOutput(self.logits(hidden, blocks_run), request)

        def whole(rows: Sequence[int]) -> Float32:
            return self.logits(hidden[rows], blocks_run)

        return CheckOutput(checks.check_logits(hidden, blocks_run), request, whole)
