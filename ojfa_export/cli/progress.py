"""Showing progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ojfa_export.cli.readable import readable_seconds, safe_for
from ojfa_export.system.progress import Task

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# Seconds between two lines of a task.
LINE_INTERVAL = 2.0


class Lines:
    """Progress in plain lines, for logs: now and then one, and one when a task is done.

    Args:
        stream: Where lines go.
        clock: Seconds that pass.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begins something of this many units."""
        task = _LineTask(what, total, unit, self._stream, self._clock)
        yield task
        task.finish()


class _LineTask:
    def __init__(
        self, what: str, total: int, unit: str, stream: TextIO, clock: Callable[[], float]
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._stream, self._clock = stream, clock
        self._done = 0
        self._start = self._last_line = clock()

    def advance(self, count: int = 1) -> None:
        self._done += count
        now = self._clock()
        if self._done >= self._total or now - self._last_line < LINE_INTERVAL:
            return
        self._last_line = now
        elapsed = now - self._start
        left = elapsed / self._done * (self._total - self._done) if self._done else None
        about = "" if left is None else f", about {readable_seconds(left)} left"
        if self._unit == "tokens" and elapsed > 0:  # a rate that says how fast a machine is
            about = f", {self._done / elapsed:,.0f} tokens/s{about}"
        self._write(f"{readable_seconds(elapsed)} elapsed{about}")

    def finish(self) -> None:
        self._write(readable_seconds(self._clock() - self._start))

    def _write(self, times: str) -> None:
        count = f"{self._done}/{self._total} {self._unit}"
        line = safe_for(self._stream, f"{self._what}: {count}, {times}")
        print(line, file=self._stream, flush=True)


class Bars:
    """Progress bars, for a terminal; a task within a task has its bar while it lasts."""

    def __init__(self) -> None:
        self._display: RichProgress | None = None

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
        """Begins something of this many units."""
        outermost = self._display is None
        display = self._display = self._display or _display()
        bar = display.add_task(safe_for(sys.stderr, what), total=total, unit=unit)
        if outermost:
            display.start()
        try:
            yield _BarTask(display, bar)
        finally:
            if outermost:
                display.stop()
                self._display = None
            else:
                display.remove_task(bar)


class _BarTask:
    def __init__(self, display: RichProgress, bar: TaskID) -> None:
        self._display, self._bar = display, bar

    def advance(self, count: int = 1) -> None:
        self._display.advance(self._bar, count)


def _display() -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Rate(ProgressColumn):
        """How fast tokens go; of other units it says nothing."""

        def render(self, task: RichTask) -> Text:
            known = task.fields["unit"] == "tokens" and task.speed
            return Text(f"{task.speed:,.0f} tokens/s," if known else "")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} {task.fields[unit]}", markup=False),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        # Results go to standard output, which rich would otherwise send where the bars are.
        redirect_stdout=False,
    )
