"""Rounds of drafts that begin before anybody has asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ojfa_export.runtime.proposals import Round
from ojfa_export.runtime.session import Session


@dataclass(frozen=True, eq=False)
class BegunRound:
    """A round under way.

    Attributes:
        pending: The tokens that it began with, of each sequence.
        before: Tokens of each sequence before those.
        round: For the session.
    """

    pending: list[list[int]]
    before: list[int]
    round: Round


class RoundsAhead:
    """The round after the last one, begun as soon as its first tokens are known.

    So that the device works while the host hands tokens on. Where the text turns out to end there,
    the round is dropped.

    Args:
        session: Which proposes at once.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ahead: BegunRound | None = None

    def begin(self, pending: Sequence[Sequence[int]], limits: Sequence[int]) -> BegunRound:
        """Begins a round that is asked for."""
        before = self._session.lengths
        begun = self._session.begin_round(pending, limits)
        return BegunRound([list(ids) for ids in pending], before, begun)

    def begin_ahead(self, pending: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        """Begins a round that is expected to be asked for next."""
        self._ahead = self.begin(pending, limits)

    def take(self, pending: Sequence[Sequence[int]]) -> BegunRound | None:
        """The round that was begun ahead, if it goes on from these tokens; else it is dropped."""
        begun = self._ahead
        if begun is None or [list(ids) for ids in pending] != begun.pending:
            self.end()
            return None
        self._ahead = None
        return begun

    def end(self) -> None:
        """Drops what was begun ahead."""
        begun, self._ahead = self._ahead, None
        if begun is not None:
            for row, length in enumerate(begun.before):
                self._session.rewind(length, row)
