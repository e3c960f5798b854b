"""Objects that one thread at a time may use, and that say so."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ojfa_export.errors import UsageError

Method = TypeVar("Method", bound=Callable[..., Any])


class Exclusive:
    """Has methods that are `exclusive`."""

    def __init__(self) -> None:
        self._in_use = threading.RLock()


def exclusive(method: Method) -> Method:
    """Lets a method be called by one thread at a time; it may call the others itself.

    Raises:
        UsageError: In the method, where another thread is in one of these methods.
    """

    @functools.wraps(method)
    def guarded(self: Exclusive, *args: Any, **kwargs: Any) -> Any:
        if not self._in_use.acquire(blocking=False):
            raise UsageError(
                f"two threads use one {type(self).__name__.lower()} at the same time",
                hint="make one for each thread: the model is shared by all of them",
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._in_use.release()

    return cast(Method, guarded)
