"""Files that stay what they were when they were checked, whenever they are opened.

Blocks are loaded when a token first needs them, long after a bundle was checked. Descriptors of
all files can't be kept: a bundle has hundreds, and a process often may open no more than 1,024.
So every file is remembered by what the system says of it, and compared right before and after it
is read; where that differs, its digest decides. What can't be seen: bytes that are overwritten in
place while a file lies mapped in memory (`CheckedFiles.check_in_place` finds that later).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ojfa_export.errors import BundleError
from ojfa_export.system.digest import sha256_of
from ojfa_export.system.files import open_regular, read_regular

if TYPE_CHECKING:
    from ojfa_export.bundle.entries import FileEntry

WHOLE = "copy the bundle again whole, or build it again"
RELOAD = (
    "load the bundle again; replace one that is in use by exchanging whole directories, never by "
    "writing into its files"
)


class Identity(NamedTuple):
    """What the system says of a file as long as nobody touches it."""

    device: int
    inode: int
    size: int
    written: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """That of a file's status."""
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(status.st_dev, status.st_ino, status.st_size, *times)


class Files:
    """Files that nobody else writes to, as those of a bundle that is being built."""

    def read(self, path: Path) -> bytes:
        """A file whole.

        Raises:
            BundleError: It was changed since it was checked.
        """
        return path.read_bytes()

    @contextmanager
    def held(self, *paths: Path) -> Iterator[None]:
        """Makes sure that files are the checked ones before and after something opens them.

        Raises:
            BundleError: One was changed since it was checked.
        """
        yield

    @contextmanager
    def mapped(
        self, path: Path, dtype: Any, offset: int, shape: tuple[int, ...]
    ) -> Iterator[NDArray[Any]]:
        """A part of a file mapped into memory, to be copied from.

        Args:
            path: The file.
            dtype: NumPy's.
            offset: Bytes before it.
            shape: Of the array.

        Raises:
            BundleError: The file was changed since it was checked, or is shorter.
        """
        with self.held(path):
            length = math.prod(shape) * np.dtype(dtype).itemsize
            if offset + length > path.stat().st_size:
                raise BundleError(f"a tensor at {path} is beyond the file", hint=WHOLE)
            yield np.memmap(path, dtype, "r", offset, shape)


UNCHECKED = Files()
# Times that a file is read while something about it changes.
ATTEMPTS = 5


class CheckedFiles(Files):
    """The files of a bundle.

    Args:
        directory: The bundle. Where a link leads to it, what it leads to now.
        entries: Size and digest of each file, by its path inside.

    Attributes:
        directory: The bundle's own, through no link: a link that is changed later changes nothing.

    Raises:
        BundleError: One of them is missing, of another size or altered.
    """

    def __init__(self, directory: Path, entries: Mapping[str, FileEntry]) -> None:
        self.directory = directory.resolve()
        self._shown, self._entries = directory, entries
        self._known: dict[str, Identity] = {}
        # Hashing releases the interpreter lock; the largest files first, so that none is last.
        names = sorted(entries, key=lambda name: -entries[name].size)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                list(pool.map(self._check, names))
            except OSError as error:
                raise BundleError(f"{directory} can't be read: {error}", hint=WHOLE) from error

    def read(self, path: Path) -> bytes:
        """See `Files`."""
        with self.held(path):
            return read_regular(path, self._entries[self._name(path)].size)

    @contextmanager
    def held(self, *paths: Path) -> Iterator[None]:
        """See `Files`."""
        names = [self._name(path) for path in paths]
        self._compare(names)
        try:
            yield
        finally:  # whatever went wrong, a file that was changed is why
            self._compare(names)

    def check_in_place(self) -> None:
        """Makes sure that nobody has written into a file, which may lie mapped in memory.

        A file that was replaced or removed as a whole is no matter here: what is mapped stays.

        Raises:
            BundleError: A file was overwritten.
        """
        inside = f"{self.directory}/"  # a Path for each file takes longer than asking the system
        for name, known in list(self._known.items()):
            try:
                found = os.lstat(inside + name)
            except OSError:
                continue
            same_file = found.st_ino == known.inode and found.st_dev == known.device
            if same_file and (found.st_size, found.st_mtime_ns) != (known.size, known.written):
                with self.held(self.directory / name):
                    pass

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.directory).as_posix()
        if name not in self._entries:
            raise BundleError(
                f"{path} is used, and the bundle's manifest does not name it", hint=WHOLE
            )
        return name

    def _compare(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                if Identity.of((self.directory / name).lstat()) != self._known[name]:
                    # Touched, linked or copied is not altered yet: its digest says.
                    self._check(name)
        except OSError as error:
            raise self._changed(str(error)) from error
        except BundleError as error:
            raise self._changed(error.message) from error

    def _changed(self, detail: str) -> BundleError:
        return BundleError(f"{self._shown} was changed after it was opened: {detail}", hint=RELOAD)

    def _check(self, name: str) -> None:
        path, entry = self._shown / name, self._entries[name]
        with open_regular(self.directory / name, follow=False) as file:
            after = Identity.of(os.fstat(file.fileno()))
            for _ in range(ATTEMPTS):
                before = after
                if before.size != entry.size:
                    raise BundleError(
                        f"{path} has {before.size} bytes, its manifest says {entry.size}",
                        hint=WHOLE,
                    )
                file.seek(0)
                if sha256_of(file) != entry.sha256:
                    raise BundleError(f"{path} was altered: its SHA-256 differs", hint=WHOLE)
                after = Identity.of(os.fstat(file.fileno()))
                if after == before:
                    self._known[name] = before
                    return
                # A backup that links it, say, changes its times: what was read was right.
        raise BundleError(f"{path} was changed while it was read", hint=WHOLE)
