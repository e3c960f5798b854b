"""What is on the device of the newest pass, so that what follows can begin from there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import ref

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.tensorrt.heads import Keeping
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.workspace import Workspace


class BeginsAhead(Protocol):
    """The part of an executor that an exit's check may use."""

    def can_begin(self, last: NewestDecode) -> bool:
        """See `executor.TensorRtExecutor`."""
        ...

    def begin(self, last: NewestDecode, blocks: range) -> tuple[tuple[Hashable, ...], Work]:
        """See `executor.TensorRtExecutor`."""
        ...


@dataclass(slots=True)
class NewestDecode:
    """A pass of one token each, as long as its result lies where it was computed.

    Attributes:
        executor: Whose.
        block: The one after it.
        chunks: Whose tokens.
        long_context: As of `backends.backend.Executor.run`.
        hidden: The result, [tokens, H].
        behind: What an exit's block has made of it, if any.
    """

    executor: BeginsAhead
    block: int
    chunks: Sequence[Chunk]
    long_context: bool
    hidden: DeviceArray
    behind: DeviceArray | None = None

    def holds(self, states: DeviceArray) -> bool:
        """Whether hidden states are the pass's result."""
        return _same(self.hidden, states)

    def gives(self, states: DeviceArray) -> bool:
        """Whether hidden states are what a head is asked about there."""
        return self.holds(states) or (self.behind is not None and _same(self.behind, states))


def _same(one: DeviceArray, other: DeviceArray) -> bool:
    return one.pointer == other.pointer and one.shape[0] == other.shape[0]


class InFlight:
    """The newest pass of a model and what was begun after it.

    Args:
        model: The opened model.

    Attributes:
        last_pass: The newest one-token pass, whose result still lies where it was computed.
        ahead: The blocks that were begun after it, ahead of an exit's check.
        keeping: What was asked to be kept last, and its recording's key: a head may do it along
            the way.
    """

    def __init__(self, model: OpenedModel) -> None:
        self._model, self._recorder = model, model.device.recorder
        self.last_pass: NewestDecode | None = None
        self.ahead: range | None = None
        self.keeping: tuple[tuple[Hashable, ...], Keeping | None] = (), None
        # Where the newest pass left its result, of which tokens, and what it works in.
        self._newest: tuple[int, int, tuple[Chunk, ...], ref[Workspace]] | None = None

    @property
    def may_be_off(self) -> bool:
        """Whether kernels on the device may find themselves called off."""
        return self.ahead is not None or self._recorder.failed

    def ran(self, hidden: DeviceArray, chunks: Sequence[Chunk], workspace: Workspace) -> None:
        """Takes what the newest pass gives, [tokens, H], and what it works in."""
        self._newest = hidden.pointer, hidden.shape[0], tuple(chunks), ref(workspace)

    def placed(self, hidden: DeviceArray, chunks: Sequence[Chunk]) -> Workspace | None:
        """What knows where these tokens are, if the newest pass gave these hidden states."""
        if self._newest is None:
            return None
        at, count, of, workspace = self._newest
        same = (at, count) == (hidden.pointer, hidden.shape[0]) and of == tuple(chunks)
        return workspace() if same else None

    def call_off(self) -> None:
        """Before anything but the blocks that were begun ahead: they are not wanted."""
        self.last_pass = None
        if self.may_be_off:
            self.ahead, self._recorder.failed = None, False
            self._recorder.add(("go on", self._model.mailbox), self._go_on)

    def _go_on(self) -> None:
        kernels = self._model.kernels[self._model.precision]
        kernels.launch("go_on", (1, 1, 1), (1, 1, 1), (), overlapping=True)
