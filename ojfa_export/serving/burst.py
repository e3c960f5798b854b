"""Requests that come in a burst begin together."""

from __future__ import annotations

import asyncio
import time

from ojfa_export.engine.engine import Engine

# Seconds without another request after which a burst is over. One that came alone waits less:
# about what a client takes from one request to the next. Of several, one may be late, as clients
# and server take turns on few cores.
_ALONE, _QUIET = 0.0003, 0.001
_MOST = 0.01  # seconds that the first of a burst waits


class Burst:
    """Holds an idle engine back while one request comes after another.

    Each takes the event loop part of a millisecond. An engine that begins with the first of them
    has the others join in its later passes, in pieces beside its steps: 16 requests of 64 tokens
    that came at once took 72 to 80 passes (bench/NOTES.md). All of it runs in one event loop.

    Args:
        engine: That the requests go to.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = self._seen = 0  # of the burst that is on, and what was seen of it
        self._begun = self._newest = 0.0

    def came(self) -> None:
        """Is told before a request goes to the engine."""
        if self._count:
            self._count += 1
        elif self._engine.hold():
            self._count, self._begun = 1, time.perf_counter()
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Comes again in every turn of the loop: timers of uvloop are too coarse."""
        now = time.perf_counter()
        if self._count != self._seen:  # handing it to the engine took time as well
            self._seen, self._newest = self._count, now
        quiet = _ALONE if self._count == 1 else _QUIET
        if now - self._newest < quiet and now - self._begun < _MOST:
            asyncio.get_running_loop().call_soon(self._look)
        else:
            self._count = self._seen = 0
            self._engine.release()
