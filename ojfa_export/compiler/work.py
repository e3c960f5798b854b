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
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.paths import check_utf8, named
from ojfa_export.system.publish import flush, publish, recover


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
    appears at once.

    Args:
        output: The bundle to be.
        fingerprint: Of everything that decides the result; work of another fingerprint is begun
            anew.
        suffix: Of the directory's name.
    """

    def __init__(self, output: Path, fingerprint: str, suffix: str = ".partial") -> None:
        self.output = named(output)
        self.directory = self.output.with_name(f"{self.output.name}{suffix}")
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
            try:
                self._prepare()
                yield self
            except CheckpointError:
                # What comes in place of this checkpoint has another fingerprint.
                shutil.rmtree(self.directory)
                raise
            except BaseException:
                if self.directory.exists() and not self._begun():
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
        for directory in (self.bundle, self.scratch):
            flush(directory)  # a power cut must not leave a record without its files
        self._save({**finished, name: asdict(record)})

    def publish(self, result: Path | None = None) -> None:
        """Makes the finished bundle, or another result, appear under its name; removes the rest."""
        publish(result or self.bundle, self.output)
        shutil.rmtree(self.directory)

    def _prepare(self) -> None:
        """Makes the folders, empty unless they hold work that can be gone on with."""
        if self._finished() is None:
            # First of all: what is removed next must not be taken for finished work.
            self._state.unlink(missing_ok=True)
            for path in (self.bundle, self.scratch):
                if path.exists():
                    shutil.rmtree(path)
            self.bundle.mkdir()
            self._save({})
        for path in (self.bundle / GRAPHS, self.bundle / ENGINES, self.bundle / REPORT):
            path.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        for path in self.bundle.rglob("*.partial"):  # files that an interruption cut short
            path.unlink()

    def _begun(self) -> bool:
        """Whether there is work to go on with."""
        below = (*self.bundle.rglob("*"), *self.scratch.rglob("*"))
        return bool(self._finished()) or any(path.is_file() for path in below)

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
        if not isinstance(state, dict) or state.get("fingerprint") != self._fingerprint:
            return None
        # After a kill while publishing, what was replaced lies where the work was.
        return state["stages"] if state.get("inode") == self._inode() else None

    def _save(self, stages: dict[str, Any]) -> None:
        state = {"fingerprint": self._fingerprint, "inode": self._inode(), "stages": stages}
        write_atomically(self._state, json.dumps(state, indent=2).encode())

    def _inode(self) -> int | None:
        """What tells the directory of the work from any other, whatever their names."""
        try:
            return self.bundle.stat().st_ino
        except FileNotFoundError:
            return None


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
        UsageError: It exists, or its path is not UTF-8.
    """
    check_utf8(output)
    recover(output)
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
