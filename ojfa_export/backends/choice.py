"""From what a head says to next tokens: what a session asks, what it gets, and the host's way.

A backend with a device computes the same there, so that a few numbers come to the host, not V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.checks import ChecksExits, checking
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


def check_on_host(
    engines: _GivesLogits,
    checks: ChecksExits,
    hidden: Hidden,
    blocks_run: int,
    request: HeadRequest,
) -> CheckOutput:
    """What a check head says, and the whole head when it is asked, by way of logits on the host.

    Args:
        engines: The engines.
        checks: The same.
        hidden: [rows, H].
        blocks_run: Of all rows.
        request: How tokens are chosen.
    """

    def whole(some: Hidden, asked: HeadRequest) -> HostHeadOutput:
        return HostHeadOutput(engines.logits(some, blocks_run), asked)

    said = HostHeadOutput(checks.check_logits(hidden, blocks_run), request)
    return CheckOutput(said, hidden, request, whole)


class ChoosesOnHost(PreparesByParts):
    """The part of `Engines` that chooses, for engines whose logits are on the host anyway.

    And that of `ChecksExits`, where they have a check head.
    """

    follows = False

    def choose(
        self: _GivesLogits, hidden: Hidden, blocks_run: int, request: HeadRequest
    ) -> HostHeadOutput | CheckOutput:
        """See `Engines.choose`."""
        checks = checking(self)
        if request.check is None or checks is None:
            return HostHeadOutput(self.logits(hidden, blocks_run), request)
        return check_on_host(self, checks, hidden, blocks_run, request)

    def check(self: ChecksExits, hidden: Hidden, blocks_run: int | Sequence[int]) -> HostHeadOutput:
        """See `backends.checks.ChecksExits`."""
        return HostHeadOutput(self.check_logits(hidden, blocks_run), HeadRequest())
