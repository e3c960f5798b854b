"""Commands killed at a moment: what bundle there was is there whole, old or new, and the same
command run again gives the new one.

A moment is an event that Python audits before it happens (files opened to write, renamed, linked,
removed, ...). Half of the moments lie anywhere, half where something takes another's place.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundles import VECTORS, Rng, Verdict
from .checkpoints import build_arguments
from .child import Outcome, run_cli, run_forked
from .judge import Fault, judge_outcome

KINDS = ("new", "overwrite", "engines")
COUNT = 40 * len(KINDS)
SECONDS = 60.0
_OLD = "old.ojfa"
_CHANGES = ("os.", "shutil.", "fcntl.", "ctypes.dl")
_REPLACING = (
    "os.rename",
    "shutil.rmtree",
    "shutil.move",
    "ctypes.dlsym",
    "fcntl.flock",
    "os.rmdir",
)


def prepare(bases: Path) -> None:
    """Builds the bundle that is replaced, and finds each command's moments."""
    arguments = build_arguments(str(bases / "llama-gqa"), str(bases / _OLD), bases / "text.txt")
    outcome = run_cli(*arguments, seconds=SECONDS)
    assert outcome.status == 0, outcome.stderr
    for kind in KINDS:
        directory = bases / f"kill-{kind}"
        directory.mkdir()
        output = _start(kind, directory, bases)
        record = functools.partial(_record, directory / "events.json")
        outcome = _run(kind, output, bases, record)
        assert outcome.status == 0, outcome.stderr


def attack(number: int, rng: Rng, directory: Path, bases: Path) -> Verdict:
    """Kills a command at a moment, looks at what is left, and runs it again."""
    kind = KINDS[number % len(KINDS)]
    events = json.loads((bases / f"kill-{kind}" / "events.json").read_text())
    moment = _moment(events, number // len(KINDS), rng)
    output = _start(kind, directory, bases)
    before = _digest(output)[0]
    outcome = _run(kind, output, bases, lambda: _kill_at(moment))
    verdict = Verdict(f"{kind}, killed before event {moment} of {len(events)}, {events[moment]}")
    if outcome.status != -signal.SIGKILL:
        verdict.ended = "not killed"
        verdict.faults += judge_outcome(outcome)
    after, said = _digest(output)
    if after is None and (before is not None or os.path.lexists(output)):
        verdict.faults.append(Fault("bundles lost", f"right after the kill: {said}"))
    verdict.ended = verdict.ended or ("old" if after == before else "new")
    again = _run(kind, output, bases, lambda: None)
    verdict.faults += judge_outcome(again)
    finished, said = _digest(output)
    if again.status != 0 and kind == "new" and after is not None:
        return verdict  # it was whole already: "exists already" is the right answer
    if again.status != 0 or finished is None:
        verdict.faults.append(Fault("bundles lost", f"run again: {again.stderr[-300:]} {said}"))
    if left := sorted(path.name for path in directory.iterdir() if path != output):
        verdict.faults.append(Fault("untidy", f"left behind: {', '.join(left)}"))
    return verdict


def _moment(events: list[str], number: int, rng: Rng) -> int:
    replacing = [i for i, name in enumerate(events) if name in _REPLACING]
    near = sorted(
        {min(i + step, len(events) - 1) for i in replacing for step in (0, 1)}, reverse=True
    )
    if number % 2 and number // 2 < len(near):
        return near[number // 2]
    return int(rng.integers(len(events)))


def _start(kind: str, directory: Path, bases: Path) -> Path:
    """What there is before the command; returns the bundle's path."""
    output = directory / "out.ojfa"
    if kind != "new":
        shutil.copytree(bases / _OLD if kind == "overwrite" else VECTORS / "llama.ojfa", output)
    return output


def _run(kind: str, output: Path, bases: Path, first: Callable[[], None]) -> Outcome:
    arguments = ["-q", "build", str(output), "--backend", "onnxruntime"]
    if kind != "engines":
        more = ["--rank", "4", "--overwrite"] if kind == "overwrite" else []
        checkpoint = str(bases / "llama-gqa")
        arguments = build_arguments(checkpoint, str(output), bases / "text.txt", *more)

    def body() -> None:
        from ojfa_export.cli.app import app

        first()
        app.main(arguments)

    return run_forked("ojfa-export " + " ".join(arguments), body, SECONDS)


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is about to change files, or to load what may."""
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event.startswith(_CHANGES) and event not in (
        "os.listdir",
        "os.scandir",
        "os.walk",
        "os.fwalk",
    )


def _record(path: Path) -> None:
    """Writes the names of this process's events when it ends."""
    names: list[str] = []
    done = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not done and _is_change(event, arguments):
            names.append(event)

    sys.addaudithook(hook)
    leave = sys.exit

    def write_and_leave(status: Any = None) -> None:
        nonlocal done
        done = True
        path.write_text(json.dumps(names))
        leave(status)

    sys.exit = write_and_leave  # type: ignore[assignment]


def _kill_at(moment: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if _is_change(event, arguments):
            count += 1  # first: a kill is audited, too
            if count == moment + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _digest(bundle: Path) -> tuple[str | None, str]:
    """The digest of a whole bundle's manifest, or None and what is wrong with it."""

    def body() -> None:
        from ojfa_export.bundle.bundle import Bundle

        print(json.loads(Bundle(bundle).manifest.to_json())["digest"])

    outcome = run_forked("open the bundle", body)
    return (outcome.stdout.strip() if outcome.status == 0 else None), outcome.stderr[-200:]
