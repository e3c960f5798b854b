"""Objects that one thread at a time may use, and that say so."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from ojfa_export.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Exclusive")


class Exclusive:
    """Has methods that are `exclusive`."""

    def __init__(self) -> None:
        self._in_use = threading.RLock()


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Lets a method be called by one thread at a time.

    Raises:
        UsageError: In the method, where another thread is in one of these methods.
    """

    @functools.wraps(method)
    def guarded(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._in_use.acquire(blocking=False):
            raise UsageError(
                f"two threads use one {type(self).__name__.lower()} at the same time",
                hint="make one for each thread: the model is shared by all of them",
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._in_use.release()

    return guarded
