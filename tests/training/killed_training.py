"""A training that is killed after some progress: a program, `killed_training.py OPTIONS STOP`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ojfa_export.training import state
from ojfa_export.training.options import TrainOptions
from ojfa_export.training.train import train


class Reports:
    """Progress that counts reports, and calls back before each."""

    def __init__(self, callback: Callable[[int], None] = lambda report: None) -> None:
        self.tasks: list[tuple[str, int]] = []
        self.count = 0
        self._callback = callback

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Reports]:
        self.tasks.append((what, total))
        yield self

    def advance(self, count: int = 1) -> None:
        self._callback(self.count)
        self.count += 1


def main(options: str, stop: int) -> None:
    """Trains, saving after every step; killed at a report, at none if it is never reached."""

    def kill(report: int) -> None:
        if report == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    state.SAVE_SECONDS, state.SAVE_SHARE = 0.0, float("inf")
    fields = json.loads(options)
    fields["text"] = tuple(map(Path, fields["text"]))
    train(TrainOptions(**fields), Reports(kill))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
