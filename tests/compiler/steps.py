"""Watching a build step by step, and stopping it at one. Also a program: see `main`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ojfa_export.bundle.names import MANIFEST
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.compiler.statistics_stage import ROUNDS

# Exporting 6 graphs, building 6 engines, 5 depths of hidden states, 3 fits, 9 pairs, 3 exits, the
# exit head's engine, 5 depths of statistics and the rounds of timing: the steps of a model with
# four blocks. Verification has none of its own.
STEPS = 38 + ROUNDS


class Steps:
    """Progress that counts steps and calls back before each is counted."""

    def __init__(self, callback: Callable[[int], None] = lambda step: None) -> None:
        self.count = 0
        self.tasks: list[str] = []
        self._callback = callback

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Steps]:
        self.tasks.append(what)
        yield self

    def advance(self, count: int = 1) -> None:
        for _ in range(count):
            self._callback(self.count)
            self.count += 1


def interrupt_at(step: int) -> Steps:
    """Ctrl-C at a step."""

    def callback(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return Steps(callback)


def kill_at(step: int) -> Steps:
    """Kills this process at a step."""

    def callback(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return Steps(callback)


def contents(bundle: Path) -> dict[str, Any]:
    """Every file's bytes by name; of the manifest, what two equal builds have in common."""
    files: dict[str, Any] = {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file()
    }
    fields = json.loads(files[MANIFEST])
    del fields["built"]["time"], fields["built"]["host"], fields["digest"], fields["default"]
    return {**files, MANIFEST: fields}


def main(options: dict[str, Any], stop: int) -> None:
    """Builds, and is killed at a step; at none if it is never reached."""
    options["output"] = Path(options["output"])
    options["calibration_data"] = tuple(map(Path, options["calibration_data"]))
    build(BuildOptions(**options), kill_at(stop))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
