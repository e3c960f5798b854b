"""Waking asyncio tasks from the engine's thread: once for all that a pass has news for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


class Wakes:
    """Completes futures of event loops; only the engine's thread calls it.

    Every call into a loop writes to its pipe, and so gives the interpreter away. While wakes are
    held they are gathered, and each loop is called once for all of them.
    """

    def __init__(self) -> None:
        self._held: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        self._depth = 0

    def wake(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        """Completes a future, now or where holding ends."""
        if self._depth:
            self._held.setdefault(loop, []).append(future)
        else:
            _complete(loop, [future])

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
                for loop, futures in held.items():
                    _complete(loop, futures)


def _complete(loop: asyncio.AbstractEventLoop, futures: Sequence[asyncio.Future[None]]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_complete_all, futures)


def _complete_all(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # its task was cancelled
            future.set_result(None)
