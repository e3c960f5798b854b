"""The directory of a build in progress: what is finished in it, so that a build can be resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ojfa_export.bundle.names import ENGINES, GRAPHS, MANIFEST, REPORT
from ojfa_export.errors import CheckpointError, OjfaError, UsageError


@dataclass(frozen=True)
class StageRecord:
    """One stage of a build.

    Attributes:
        seconds: Wall-clock time.
        peak_memory_bytes: Largest resident memory of the process up to the stage's end.
        resumed: Whether an earlier run had finished it.
    """

    name: str
    seconds: float
    peak_memory_bytes: int
    resumed: bool = False


class Work:
    """`BUNDLE.partial`, beside the bundle to be: the same file system, so that the finished bundle
    appears by one rename.

    Args:
        output: The bundle to be.
        fingerprint: Of everything that decides the result; work of another fingerprint is begun
            anew.
        suffix: Of the directory's name.
    """

    def __init__(self, output: Path, fingerprint: str, suffix: str = ".partial") -> None:
        self.output = output
        self.directory = output.with_name(f"{output.name}{suffix}")
        self.bundle = self.directory / "bundle"
        self.scratch = self.directory / "scratch"
        self._state = self.directory / "state.json"
        self._fingerprint = fingerprint
        self.records: list[StageRecord] = []

    @contextmanager
    def open(self) -> Iterator[Work]:
        """Takes hold of the directory; another build of the same bundle is refused."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with _full_disk_at(self.directory), (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._taken() from None
            if not _is_at(lock.fileno(), self.directory / "lock"):
                raise self._taken()  # the other build ended, and removed the directory, just now
            if self._finished() is None or not self.bundle.is_dir():
                for path in (self.bundle, self.scratch):
                    shutil.rmtree(path, ignore_errors=True)
                self._save({})
            for path in (self.bundle / GRAPHS, self.bundle / ENGINES, self.bundle / REPORT):
                path.mkdir(parents=True, exist_ok=True)
            self.scratch.mkdir(exist_ok=True)
            for path in self.bundle.rglob("*.partial"):  # files that an interruption cut short
                path.unlink()
            try:
                yield self
            except CheckpointError:
                # What comes in place of this checkpoint has another fingerprint.
                shutil.rmtree(self.directory)
                raise

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """A stage: yields whether there is anything to do, and records it when it ends well."""
        finished = self._finished() or {}
        if name in finished:
            self.records.append(StageRecord(**{**finished[name], "resumed": True}))
            yield False
            return
        start = time.perf_counter()
        yield True
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = StageRecord(name, round(time.perf_counter() - start, 3), peak)
        self.records.append(record)
        self._save({**finished, name: asdict(record)})

    def publish(self) -> None:
        """Makes the finished bundle appear under its name, and removes the rest."""
        flush(self.bundle)
        replaced = os.path.lexists(self.output)
        if replaced:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.output.rename(self.scratch)
        try:
            self.bundle.rename(self.output)
        except BaseException:
            if replaced:
                self.scratch.rename(self.output)
            raise
        shutil.rmtree(self.directory)

    def _taken(self) -> OjfaError:
        return OjfaError(
            f"{self.output} is being built by another process",
            hint="wait for it, or choose another output",
        )

    def _finished(self) -> dict[str, dict[str, Any]] | None:
        """Finished stages of the work that is there, or None where it is other work."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(state, dict) and state.get("fingerprint") == self._fingerprint
        return state["stages"] if same else None

    def _save(self, stages: dict[str, Any]) -> None:
        partial = self._state.with_suffix(".partial")
        partial.write_text(
            json.dumps({"fingerprint": self._fingerprint, "stages": stages}, indent=2),
            encoding="utf-8",
        )
        partial.rename(self._state)


def flush(directory: Path) -> None:
    """Waits until everything below a directory is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _full_disk_at(directory: Path) -> Iterator[None]:
    """Says where there is no space left: a failing write to an open file doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(directory)
        raise


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def check_output(output: Path, overwrite: bool, holds: str | None = MANIFEST) -> None:
    """Refuses to replace what is there, unless asked to and it is of the kind that is written.

    Args:
        output: What would be written.
        overwrite: Whether the user asked to replace it.
        holds: A file that a directory of this kind holds; None where a file is written.

    Raises:
        UsageError: It exists.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(
            f"{output} exists already", hint="choose another output, or add --overwrite"
        )
    if not (output if holds is None else output / holds).is_file():
        what = "is no file" if holds is None else f"holds no {holds}"
        raise UsageError(
            f"{output} exists and {what}: it is not overwritten", hint="choose another output"
        )
