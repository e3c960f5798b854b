"""From logits to next tokens: the request to a head, its output, and how the host computes it.

A backend with a device computes the same there, so that a few numbers come to the host, not V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure, confidence
from ojfa_export.decoding.sampling import GREEDY, Sampling
from ojfa_export.errors import BackendError


@dataclass(frozen=True)
class ExitCheck:
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
class HeadRequest:
    """How tokens are chosen from a head's logits.

    Attributes:
        sampling: Temperature, top-k and top-p.
        draws: A number from [0, 1) for each row, where any token is sampled.
        check: At an exit that is checked.
        samplings: Of each row, in place of `sampling`, where they differ.
    """

    sampling: Sampling = GREEDY
    draws: Sequence[float] = ()
    check: ExitCheck | None = None
    samplings: Sequence[Sampling] = ()

    @property
    def samples(self) -> bool:
        """Whether any token is sampled."""
        return any(each.temperature for each in self.samplings or (self.sampling,))

    def of_rows(self, rows: int) -> Sequence[Sampling]:
        """How the token of each row is chosen."""
        return self.samplings or [self.sampling] * rows

    def of(self, rows: Sequence[int]) -> HeadRequest:
        """Of rows by their indices, without what follows an exit."""
        draws = [self.draws[row] for row in rows] if self.draws else ()
        samplings = [self.samplings[row] for row in rows] if self.samplings else ()
        return HeadRequest(self.sampling, draws, None, samplings)

    def part(self, rows: slice) -> HeadRequest:
        """Of some rows, without what follows an exit."""
        return HeadRequest(self.sampling, self.draws[rows], None, self.samplings[rows])


class HeadOutput(Protocol):
    """The next tokens of some rows. On a device they may be on their way: asking waits for them."""

    def tokens(self) -> list[int]:
        """The chosen tokens, [rows]."""
        ...

    def stand_ins(self) -> list[int]:
        """Ids by which the next pass may name the chosen tokens, [rows].

        Where `Engines.follows`, numbers below 0 stand for tokens that the device alone knows, so
        that asking doesn't wait, as long as only a few outputs have been launched since.
        """
        ...

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits, [rows]; the lowest id among equals."""
        ...

    def confidence(self, measure: Measure) -> list[float]:
        """The confidence of the head, [rows]; see `decoding.confidence.confidence`."""
        ...


class HostHeadOutput:
    """Next tokens from logits on the host.

    Args:
        logits: [rows, V].
        request: How tokens are chosen.
    """

    def __init__(self, logits: Float32, request: HeadRequest) -> None:
        self.logits, self._request = logits, request

    def tokens(self) -> list[int]:
        """See `HeadOutput`."""
        likeliest, request = self.likeliest(), self._request
        if not request.samples:
            return likeliest
        rows = zip(
            self.logits, request.of_rows(len(likeliest)), request.draws, likeliest, strict=True
        )
        return [
            sampling.pick(logits, draw) if sampling.temperature else token
            for logits, sampling, draw, token in rows
        ]

    def stand_ins(self) -> list[int]:
        """See `HeadOutput`."""
        return self.tokens()

    def likeliest(self) -> list[int]:
        """See `HeadOutput`."""
        chosen: list[int] = self.logits.argmax(axis=-1).tolist()
        # NumPy's argmax finds what is not a number first, so that one look a row is enough.
        if not all(isfinite(row[token]) for row, token in zip(self.logits, chosen, strict=True)):
            raise BackendError(
                "the model gives logits that are no numbers (NaN or infinite)",
                hint="check the bundle with 'ojfa-export verify BUNDLE'",
            )
        return chosen

    def confidence(self, measure: Measure) -> list[float]:
        """See `HeadOutput`."""
        values: list[float] = confidence(self.logits, measure).tolist()
        return values
