"""How long work tells what it is doing; the command line shows it, the library is silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """Something under way."""

    def advance(self, count: int = 1) -> None:
        """Says that so many more units are done."""
        ...


class Progress(Protocol):
    """Where progress is shown."""

    def task(self, what: str, total: int, unit: str) -> AbstractContextManager[Task]:
        """Begins something of this many units."""
        ...


class _SilentTask:
    def advance(self, count: int = 1) -> None:
        """Shows nothing."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Shows nothing."""
        yield _SilentTask()


SILENT: Progress = Silent()
