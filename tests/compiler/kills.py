"""Kills the program at random moments of its work. Also a program: `kills.py 40`."""

from __future__ import annotations

import inspect
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ojfa_export.bundle.bundle import Bundle

# What a user must never see.
BUGS = ("Traceback", "internal error", "panicked")


@dataclass(frozen=True)
class Run:
    """One run of the program.

    Attributes:
        killed: Whether it was killed before it ended.
        seconds: How long it ran.
        said: What it wrote.
    """

    killed: bool
    seconds: float
    said: str


def run(arguments: Sequence[str], seconds: float | None = None) -> Run:
    """Runs `ojfa-export`, and kills it after so many seconds.

    Raises:
        AssertionError: It failed, or showed a user what is a bug.
    """
    command = [sys.executable, "-m", "ojfa_export", *arguments]
    environment = {"OMP_NUM_THREADS": "1", "OJFA_THREADS": "1", **os.environ}
    start = time.monotonic()
    # Files, not pipes: the program has nobody to wait for.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        took = time.monotonic() - start
        said.seek(0)
        ended = Run(process.returncode == -9, took, said.read())
    assert ended.killed or process.returncode == 0, ended.said
    assert not any(bug in ended.said for bug in BUGS), ended.said
    return ended


def kill_and_check(arguments: Sequence[str], bundle: Path, seconds: float) -> bool:
    """Kills a command that replaces a bundle, then does what a user would do.

    The next command must find a whole bundle; the same command, run again, must replace it and
    leave nothing beside it that was not there before.

    Args:
        arguments: Of `ojfa-export`.
        bundle: It is there already, whole.
        seconds: When to kill.

    Returns:
        Whether the command was killed; it may have been faster.

    Raises:
        AssertionError: The bundle is lost or damaged, or a run failed.
    """
    before = set(bundle.parent.iterdir())
    killed = run(arguments, seconds).killed
    Bundle(bundle)  # checks every file
    run(arguments)
    Bundle(bundle)
    assert set(bundle.parent.iterdir()) == before
    return killed


def build_arguments(checkpoint: Path, text: Path, bundle: Path) -> list[str]:
    """A small build that replaces what is there."""
    small = ["--calibration-tokens", "1024", "--max-cache-length", "64", "--rank", "8"]
    return [
        *("build", str(checkpoint), "-o", str(bundle), "--overwrite", "--shortcut", "ojfa"),
        *("--calibration-data", str(text), *small, "--skip-verification"),
    ]


def kill_builds(
    checkpoint: Path, text: Path, directory: Path, times: int, choose: random.Random
) -> int:
    """Kills builds, and as many commands that add engines, at random moments.

    Args:
        checkpoint: Of a small model.
        text: To calibrate on.
        directory: An empty one, for the bundle.
        times: Kills of each command.
        choose: The moments.

    Returns:
        How many commands were killed before they ended.

    Raises:
        AssertionError: A bundle was lost, or a run failed.
    """
    bundle = directory / "out.ojfa"
    building = build_arguments(checkpoint, text, bundle)
    adding = ["build", str(bundle), "--backend", "onnxruntime", "--skip-verification"]
    killed = 0
    for arguments in (building, adding):
        whole = run(arguments).seconds
        for _ in range(times):
            killed += kill_and_check(arguments, bundle, choose.uniform(0.2, 1.0) * whole)
    return killed


def main(times: int) -> None:
    """Does it on a model that is made here."""
    import argparse

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import make_checkpoint

    seed = int(os.environ.get("OJFA_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"OJFA_TEST_SEED={seed}")
    directory = Path(tempfile.mkdtemp())
    try:
        checkpoint = make_checkpoint("llama-gqa", directory / "checkpoint", seed=11)
        text = directory / "text.txt"
        text.write_text(inspect.getsource(argparse), encoding="utf-8")
        place = directory / "bundles"
        place.mkdir()
        killed = kill_builds(checkpoint, text, place, times, random.Random(seed))
    finally:
        shutil.rmtree(directory)
    print(f"{2 * times} commands, {killed} killed before they ended: no bundle lost")


if __name__ == "__main__":
    main(int(sys.argv[1]))
