"""What a check head says: how sure an exit is, before anybody asks for its token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ojfa_export.decoding.arrays import Hidden
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest


class CheckOutput:
    """The confidence of some rows by the check head; their tokens are the whole head's.

    The whole head is asked when a token is, about the rows of `leave` or else about all. That must
    be before the hidden states are overwritten: before anything else runs.

    Args:
        said: By the check head, of the same rows; only its confidence counts.
        hidden: [rows, H], wherever the engines have it.
        request: How tokens are chosen.
        whole: Asks the whole head about hidden states.
    """

    def __init__(
        self,
        said: HeadOutput,
        hidden: Hidden,
        request: HeadRequest,
        whole: Callable[[Hidden, HeadRequest], HeadOutput],
    ) -> None:
        self._said, self._hidden, self._request, self._whole = said, hidden, request, whole
        self._all: HeadOutput | None = None

    def confidence(self, measure: Measure) -> list[float]:
        """See `HeadOutput`: over the tokens of the check head."""
        return self._said.confidence(measure)

    def leave(self, rows: Sequence[int]) -> HeadOutput:
        """The whole head's output of the rows that leave here, in rising order, by one call."""
        hidden = self._hidden
        some = hidden if len(rows) == len(hidden) else hidden[list(rows)]
        return self._whole(some, self._request.of(rows))

    def tokens(self) -> list[int]:
        """See `HeadOutput`."""
        return self._asked().tokens()

    def stand_ins(self) -> list[int]:
        """See `HeadOutput`."""
        return self._asked().stand_ins()

    def likeliest(self) -> list[int]:
        """See `HeadOutput`."""
        return self._asked().likeliest()

    def _asked(self) -> HeadOutput:
        if self._all is None:
            self._all = self.leave(range(len(self._hidden)))
        return self._all
