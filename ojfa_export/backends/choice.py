"""From what a head says to next tokens: what a session asks, what it gets, and the host's way.

A backend with a device computes the same there, so that a few numbers come to the host, not V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from ojfa_export.backends.backend import Executor, Float32, Hidden
from ojfa_export.backends.passes import Chunk, Pass
from ojfa_export.errors import BackendError
from ojfa_export.runtime.policy import Measure, confidence
from ojfa_export.runtime.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Stop:
    """What follows an exit's check. A hint: a device may begin with it before the host has looked.

    Attributes:
        measure: Of confidence.
        threshold: Nothing follows where every row's confidence reaches it.
        then: The blocks that run next on the same rows otherwise.
    """

    measure: Measure
    threshold: float
    then: range


@dataclass(slots=True)
class Choosing:
    """How tokens are chosen from a head's logits.

    Attributes:
        sampling: Temperature, top-k and top-p.
        draws: A number from [0, 1) for each row, where tokens are sampled.
        stop: At an exit that is checked.
    """

    sampling: Sampling = GREEDY
    draws: Sequence[float] = ()
    stop: Stop | None = None


class Choices(Protocol):
    """The next tokens of some rows. On a device they may be on their way: asking waits for them."""

    def tokens(self) -> list[int]:
        """The chosen tokens, [rows]."""
        ...

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits, [rows]; the lowest id among equals."""
        ...

    def confidence(self, measure: Measure) -> list[float]:
        """How sure the head is, [rows]; see `runtime.policy.confidence`."""
        ...


class HostChoices:
    """Choices from logits on the host.

    Args:
        logits: [rows, V].
        how: How tokens are chosen.
    """

    def __init__(self, logits: Float32, how: Choosing) -> None:
        self.logits, self._how = logits, how

    def tokens(self) -> list[int]:
        """See `Choices`."""
        likeliest = self.likeliest()
        if not self._how.sampling.temperature:
            return likeliest
        both = zip(self.logits, self._how.draws, strict=True)
        return [self._how.sampling.pick(logits, draw) for logits, draw in both]

    def likeliest(self) -> list[int]:
        """See `Choices`."""
        tokens = self.logits.argmax(axis=-1)
        # NumPy's argmax finds what is not a number first, so that one look a row is enough.
        if not np.isfinite(self.logits[np.arange(len(tokens)), tokens]).all():
            raise BackendError(
                "the model gives logits that are no numbers (NaN or infinite)",
                hint="check the bundle with 'ojfa-export verify BUNDLE'",
            )
        chosen: list[int] = tokens.tolist()
        return chosen

    def confidence(self, measure: Measure) -> list[float]:
        """See `Choices`."""
        values: list[float] = confidence(self.logits, measure).tolist()
        return values


@dataclass(slots=True)
class Newest:
    """What the newest pass of an executor gave, as long as it lies where it was computed.

    Attributes:
        depth: Blocks that its tokens have run; 0 where there is none.
        chunks: Whose tokens.
        hidden: [tokens, H].
    """

    depth: int = 0
    chunks: tuple[Chunk, ...] = ()
    hidden: Hidden = None

    def is_of(self, step: Pass) -> bool:
        """Whether a pass goes on with just these tokens."""
        return self.depth == step.blocks.start > 0 and self.chunks == step.chunks

    def set(self, step: Pass, hidden: Hidden) -> None:
        """Takes what a pass gave."""
        self.depth, self.chunks, self.hidden = step.blocks.stop, step.chunks, hidden

    def clear(self) -> None:
        """Forgets it: a pass is under way, or tokens were dropped."""
        self.depth, self.chunks, self.hidden = 0, (), None


def run_and_choose(
    engines: _Chooses,
    executor: Executor,
    step: Pass,
    states: Hidden | None,
    newest: Newest,
    how: Choosing,
) -> Choices:
    """What `Engines.prepare` gets ready, by its parts."""
    hidden = newest.hidden if step.tokens is None else executor.embed(step.tokens, step.chunks)
    newest.clear()
    hidden = executor.run(step.blocks, hidden, step.chunks, long_context=step.long_context)
    if states is not None:
        executor.store(states, step.chunks, hidden)
    newest.set(step, hidden)
    return engines.choose(executor.arrays.ascontiguousarray(hidden), step.blocks.stop, how)


class _Chooses(Protocol):
    def choose(self, hidden: Hidden, blocks_run: int, how: Choosing) -> Choices: ...


class _GivesLogits(_Chooses, Protocol):
    def logits(self, hidden: Hidden, blocks_run: int) -> Float32: ...


class PreparesByParts:
    """The part of `Engines` that prepares, for engines that know no shorter way."""

    def prepare(
        self: _Chooses,
        executor: Executor,
        step: Pass,
        states: Hidden | None,
        newest: Newest,
        how: Choosing,
    ) -> Callable[[], Choices]:
        """See `Engines.prepare`."""
        return partial(run_and_choose, self, executor, step, states, newest, how)


class ChoosesOnHost(PreparesByParts):
    """The part of `Engines` that chooses, for engines whose logits are on the host anyway."""

    follows = False

    def choose(self: _GivesLogits, hidden: Hidden, blocks_run: int, how: Choosing) -> HostChoices:
        """See `Engines.choose`."""
        return HostChoices(self.logits(hidden, blocks_run), how)
