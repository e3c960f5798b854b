"""The session of the last generation, which the next one goes on with.

On a GPU a session runs its first steps piece by piece, and records them as it runs them again:
some 3 ms a kind of step. A generation that takes over the last one's session has all that behind
it, and its cache in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from ojfa_export.runtime.generation import Token
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.stats import Stats

# Sessions are made for whole multiples of so many tokens, so that the next prompt, which is
# somewhat longer, finds room as well.
ROOM = 256


class LastSession:
    """One session that nobody uses, if there is one; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session: Session | None = None

    def take(self, batch_size: int, length: int, drafts: bool) -> Session | None:
        """The session, empty, if it has the sequences, the room and the drafts that are wanted.

        Another is dropped, before one is made in its place.
        """
        with self._lock:
            session, self._session = self._session, None
        if session is None or session.max_length < length:
            return None
        same = session.batch_size == batch_size and session.has_drafts == drafts
        return session if same else None

    def drop(self) -> None:
        """Lets go of the session, and of the memory of its cache."""
        with self._lock:
            self._session = None

    def kept_after(self, session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
        """Keeps the session of a generation that has come to its end."""
        yield from tokens
        for row in range(session.batch_size):
            session.rewind(0, row)
        session.stats = Stats()
        with self._lock:
            self._session = session
