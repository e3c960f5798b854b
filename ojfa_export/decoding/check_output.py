"""What a check head says: how sure an exit is, before anybody asks for its token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure, confidence
from ojfa_export.decoding.head_output import HeadRequest, HostHeadOutput


class CheckOutput:
    """The confidence of some rows by the check head; their tokens are the whole head's.

    The whole head is asked when a token is, about the rows of `leave` or else about all. That must
    be before the hidden states are overwritten: before anything else runs.

    Args:
        logits: [rows, n] of the check head.
        request: How tokens are chosen.
        whole: Gives the whole head's logits [len(indices), V] of some of the rows.
    """

    def __init__(
        self, logits: Float32, request: HeadRequest, whole: Callable[[Sequence[int]], Float32]
    ) -> None:
        self._logits, self._request, self._whole = logits, request, whole
        self._all: HostHeadOutput | None = None

    def confidence(self, measure: Measure) -> list[float]:
        """See `HeadOutput`: over the tokens of the check head."""
        values: list[float] = confidence(self._logits, measure).tolist()
        return values

    def leave(self, rows: Sequence[int]) -> HostHeadOutput:
        """The whole head's output of the rows that leave here, in their order, by one call."""
        return HostHeadOutput(self._whole(rows), self._request.of(rows))

    def tokens(self) -> list[int]:
        """See `HeadOutput`."""
        return self._asked().tokens()

    def stand_ins(self) -> list[int]:
        """See `HeadOutput`."""
        return self.tokens()

    def likeliest(self) -> list[int]:
        """See `HeadOutput`."""
        return self._asked().likeliest()

    def _asked(self) -> HostHeadOutput:
        if self._all is None:
            self._all = self.leave(range(len(self._logits)))
        return self._all
