"""From what a head says to next tokens: what a session asks, what it gets, and the host's way.

A backend with a device computes the same there, so that a few numbers come to the host, not V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from ojfa_export.backends.backend import Cache, Float32, Hidden
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
class OneToken:
    """One token of each of some sequences on its way through the blocks.

    Attributes:
        rows: The sequences, neighbours.
        starts: The tokens' positions.
        tokens: Their ids, or the choices that they will be; None where they have been embedded.
        long_context: Whether LongRoPE's long factors apply.
        depth: Blocks that they have run.
        hidden: States [rows, 1, H] after so many; None before the first.
        clear: The block up to which nothing else of these sequences waits.
    """

    rows: slice
    starts: list[int]
    tokens: list[int] | Choices | None
    long_context: bool
    depth: int = 0
    hidden: Hidden | None = None
    clear: int = 0


def run_on(
    engines: _Chooses, cache: Cache, one: OneToken, depth: int, kept: Hidden | None, how: Choosing
) -> Choices:
    """What `Engines.prepare` gets ready, by its parts."""
    hidden, rows, starts = one.hidden, one.rows, one.starts
    if hidden is None:
        known = isinstance(one.tokens, list)
        hidden = cache.embed(
            np.array(one.tokens, np.int32)[:, None] if known else one.tokens, starts
        )
    blocks = range(one.depth, depth)
    hidden = cache.run_blocks(blocks, hidden, rows, starts, long_context=one.long_context)
    if kept is not None:
        cache.keep(kept, rows, starts, hidden)
    one.depth, one.hidden = depth, hidden
    states = cache.arrays.ascontiguousarray(hidden.reshape(len(hidden), -1))
    return engines.choose(states, depth, how)


class _Chooses(Protocol):
    def choose(self, hidden: Hidden, blocks_run: int, how: Choosing) -> Choices: ...


class _GivesLogits(_Chooses, Protocol):
    def logits(self, hidden: Hidden, blocks_run: int) -> Float32: ...


class PreparesByParts:
    """The part of `Engines` that prepares, for engines that know no shorter way."""

    def prepare(
        self: _Chooses,
        cache: Cache,
        one: OneToken,
        depth: int,
        kept: Hidden | None,
        how: Choosing,
    ) -> Callable[[], Choices]:
        """See `Engines.prepare`."""
        return partial(run_on, self, cache, one, depth, kept, how)


class ChoosesOnHost(PreparesByParts):
    """The part of `Engines` that chooses, for engines whose logits are on the host anyway."""

    follows = False

    def choose(self: _GivesLogits, hidden: Hidden, blocks_run: int, how: Choosing) -> HostChoices:
        """See `Engines.choose`."""
        return HostChoices(self.logits(hidden, blocks_run), how)
