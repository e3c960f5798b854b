"""Waking asyncio tasks from the engine's thread: once for all that a pass has news for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


class Wakes:
    """Sets events of event loops; only the engine's thread calls it.

    Every call into a loop writes to its pipe, and so gives the interpreter away. While wakes are
    held they are gathered, and each loop is called once for all of them.
    """

    def __init__(self) -> None:
        self._held: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        self._depth = 0

    def wake(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Sets an event, now or where holding ends."""
        if self._depth:
            self._held.setdefault(loop, []).append(event)
        else:
            _set(loop, [event])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Gathers what is woken inside, and wakes it at the end whatever happens."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self._held:
                held, self._held = self._held, {}
                for loop, events in held.items():
                    _set(loop, events)


def _set(loop: asyncio.AbstractEventLoop, events: Sequence[asyncio.Event]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()
