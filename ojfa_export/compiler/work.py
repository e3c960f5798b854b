"""The directory of a build in progress: what is finished in it, so that a build can be resumed."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ojfa_export.bundle.names import ENGINES, GRAPHS, MANIFEST, REPORT
from ojfa_export.compiler.kept import State, names_below, read_state
from ojfa_export.errors import CheckpointError, OjfaError, UsageError
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
        fingerprint: Of everything that decides the result.
        suffix: Of the directory's name.
        keys: For each stage, a digest of everything that decides what it makes, earlier stages
            included. Work of another fingerprint is gone on with where keys are the same, and
            begun anew where no keys are given.

    Attributes:
        dropped: Finished stages that were there and are of no use, as their keys are others.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: str,
        suffix: str = ".partial",
        *,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        self.output = named(output)
        self.directory = self.output.with_name(f"{self.output.name}{suffix}")
        self.bundle = self.directory / "bundle"
        self.scratch = self.directory / "scratch"
        self._file = self.directory / "state.json"
        self._fingerprint = fingerprint
        self._keys = keys
        self._state = State(fingerprint, None)
        self.records: list[StageRecord] = []
        self.dropped: tuple[str, ...] = ()

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the stages that are finished."""
        return tuple(self._state.finished)

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
        finished = self._state.finished.get(name)
        if finished is not None:
            self.records.append(StageRecord(**{**finished, "resumed": True}))
            yield False
            return
        key = self._key(name)
        self._state.begin(name, key)
        self._save()
        start = time.perf_counter()
        yield True
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = StageRecord(name, round(time.perf_counter() - start, 3), peak)
        self.records.append(record)
        for directory in (self.bundle, self.scratch):
            flush(directory)  # a power cut must not leave a record without its files
        self._state.end(name, key, asdict(record), self.directory)
        self._save()

    def publish(self, result: Path | None = None) -> None:
        """Makes the finished bundle, or another result, appear under its name; removes the rest."""
        publish(result or self.bundle, self.output)
        shutil.rmtree(self.directory)

    def _prepare(self) -> None:
        """Makes the folders, empty unless they hold work that can be gone on with."""
        state = read_state(self._file)
        if state is None or state.inode is None or state.inode != self._inode():
            # First of all: what is removed next must not be taken for finished work.
            self._file.unlink(missing_ok=True)
            for path in (self.bundle, self.scratch):
                if path.exists():
                    shutil.rmtree(path)
            self.bundle.mkdir()
            self._state = State(self._fingerprint, self._inode())
            self._save()
        elif state.fingerprint == self._fingerprint:
            self._state = state
        else:
            self._keep_what_fits(state)
        for path in (self.bundle / GRAPHS, self.bundle / ENGINES, self.bundle / REPORT):
            path.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        for path in self.bundle.rglob("*.partial"):  # files that an interruption cut short
            path.unlink()

    def _keep_what_fits(self, state: State) -> None:
        """Removes what another build had made and this one makes otherwise."""
        kept = state.fitting(self.directory, self._keys or {})
        self.dropped = tuple(name for name in state.finished if name not in kept)
        # Of no fingerprint until all is removed: a kill in between leaves files of nobody, which
        # must not be taken for work.
        self._state = State("", state.inode, kept)
        self._save()
        files = {file for each in kept.values() for file in each.files}
        for name in names_below(self.directory):
            if name not in files:
                (self.directory / name).unlink()
        _remove_empty(self.bundle)
        self._state.fingerprint = self._fingerprint
        self._save()

    def _key(self, name: str) -> str:
        return self._fingerprint if self._keys is None else self._keys[name]

    def _begun(self) -> bool:
        """Whether there is work to go on with."""
        return bool(self._state.finished) or bool(names_below(self.directory))

    def _taken(self) -> OjfaError:
        return OjfaError(
            f"{self.output} is being built by another process",
            hint="wait for it, or choose another output",
        )

    def _save(self) -> None:
        self._state.save(self._file)

    def _inode(self) -> int | None:
        """Of the bundle's directory."""
        try:
            return self.bundle.stat().st_ino
        except FileNotFoundError:
            return None


def _remove_empty(directory: Path) -> None:
    """Removes empty folders below a directory, which a bundle would else be left with."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


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
