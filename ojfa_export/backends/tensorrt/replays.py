"""Steps that were recorded, known by what was asked: one lookup and one launch.

What a session asks goes through the executor and a head piece by piece the first times, and all
that was put on the stream for it becomes one recording (`cuda.recorder`). From then on that is
replayed here, and of what the pieces know only what they would have left behind is set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Protocol

from ojfa_export.backends.choice import Chooses, run_and_choose
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.recorder import Recording
from ojfa_export.backends.passes import Newest, Pass, positions_of
from ojfa_export.backends.tensorrt.executor import TensorRtExecutor
from ojfa_export.backends.tensorrt.heads import HEAD_ROWS
from ojfa_export.backends.tensorrt.in_flight import InFlight, NewestDecode
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.decoding.arrays import Hidden
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest


class Asks(Chooses, Protocol):
    """The part of `engines.TensorRtEngines` that heads are asked through."""

    def of_check(
        self, said: HeadOutput, states: DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """See there."""
        ...


class Replays:
    """Runs tokens on and asks heads.

    Args:
        engines: Choose.
        model: The opened model.
        in_flight: What is on the device of its newest pass.
    """

    def __init__(self, engines: Asks, model: OpenedModel, in_flight: InFlight) -> None:
        self._engines, self._in_flight = engines, in_flight
        self._mailbox, self._recorder = model.mailbox, model.device.recorder

    def prepare(
        self,
        executor: TensorRtExecutor,
        step: Pass,
        states: Hidden | None,
        newest: Newest,
        request: HeadRequest,
    ) -> Callable[[], HeadOutput]:
        """See `backends.backend.Engines.prepare`."""
        key = self._key(executor, step, states, newest, request)
        known = None if key is None else self._recorder.find(key)
        if known is not None:
            return partial(self._replay, executor, step, newest, request, *known)
        return partial(self._record, key, executor, step, states, newest, request)

    def _record(
        self,
        key: Hashable | None,
        executor: TensorRtExecutor,
        step: Pass,
        states: Hidden | None,
        newest: Newest,
        request: HeadRequest,
    ) -> HeadOutput:
        launches = self._recorder.launches
        choices = run_and_choose(self._engines, executor, step, states, newest, request)
        if key is not None and self._recorder.launches == launches + 1:
            self._recorder.name(key, self._in_flight.ahead)
        return choices

    def _key(
        self,
        executor: TensorRtExecutor,
        step: Pass,
        states: Hidden | None,
        newest: Newest,
        request: HeadRequest,
    ) -> tuple[Hashable, ...] | None:
        """All that decides what is put on the stream; None where that is more than a recording."""
        count, way = len(step.chunks), executor.way(step, newest)
        if way is None or self._recorder.pending or count > HEAD_ROWS:
            return None
        return (
            executor.key,
            way,
            self._in_flight.may_be_off,
            step.blocks,
            count,
            step.long_context,
            None if states is None else states.pointer,
            request.samples,
            request.check,
        )

    def _replay(
        self,
        executor: TensorRtExecutor,
        step: Pass,
        newest: Newest,
        request: HeadRequest,
        graph: Recording,
        ahead: range | None,
    ) -> HeadOutput:
        in_flight, chunks, depth = self._in_flight, step.chunks, step.blocks.stop
        workspace, positions = executor.workspace(len(chunks)), positions_of(chunks)
        executor.make_ready(chunks)
        self._mailbox.leave(request)
        # Whenever this is interrupted, nothing is taken to be on the device that may not be.
        in_flight.last_pass, in_flight.keeping, in_flight.ahead = None, ((), None), ahead
        newest.clear()
        if step.tokens is not None:
            if isinstance(step.tokens, list):
                workspace.name(step.tokens, positions)
            workspace.moved_to([])
        self._recorder.replay(graph)
        said = self._mailbox.expect(len(chunks))
        if step.tokens is not None:
            workspace.moved_to(positions)
        hidden = workspace.hidden[depth % 2]
        newest.set(step, hidden)
        in_flight.last_pass = NewestDecode(executor, depth, chunks, step.long_context, hidden)
        return self._engines.of_check(said, hidden, depth, request)
