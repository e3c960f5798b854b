"""Directories that take another's place: one of the two is there whole, whatever comes between."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ojfa_export.errors import OjfaError
from ojfa_export.system.paths import named

# Of Linux's renameat2: paths count from the working directory, and both names change hands.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# What file systems (and kernels) answer that can't exchange.
CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def publish(new: Path, target: Path) -> None:
    """Puts a directory or file in the place of another, or of none.

    Directories' names change hands in one step where the file system can do that. Elsewhere the
    old one stands aside for a moment, under a name of its own beside the target: `recover` puts it
    back after a kill in that moment.

    Args:
        new: In a working directory of the caller's, on the target's file system.
        target: The name it gets. A directory that had it lies in the working directory
            afterwards, for the caller to remove.

    Raises:
        OSError: It can't be done; both are as they were.
    """
    flush(new)
    target = named(target)
    recover(target)
    _clear_aside(new, target)
    if not os.path.lexists(target) or not new.is_dir():
        new.rename(target)
    elif not exchange(new, target):
        _replace_in_turn(new, target)
    # Before the caller removes the old one: a power cut must not undo the renames alone.
    for directory in (target.parent, new.parent):
        _sync(directory)


def recover(path: Path) -> None:
    """Puts back what stood aside when a `publish` was killed, if nothing has come in its place.

    Whatever opens or writes a published directory begins with this.

    Raises:
        OjfaError: It can't be put back here, as on a file system that is read-only.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) or not os.path.lexists(_aside(target)):
        return
    aside = _aside(target)
    try:
        aside.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            return  # another process was faster
        raise OjfaError(
            f"{path} was about to be replaced by a program that was killed; it is whole, but can't "
            f"be put back: {error.strerror}",
            hint=f"rename {aside} to {target}",
        ) from error


def flush(path: Path) -> None:
    """Waits until a file, or everything below a directory, is on the disk."""
    for each in [*path.rglob("*"), path]:
        _sync(each)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; says whether that can be done here.

    Raises:
        OSError: It can be done, but not with these.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _replace_in_turn(new: Path, target: Path) -> None:
    """The old one stands aside, the new one takes its place, the old one leaves."""
    aside = _aside(target)
    try:
        while True:
            with suppress(FileNotFoundError):  # another process replaced it at the same time
                target.rename(aside)
            try:
                new.rename(target)
                break
            except OSError:
                if not os.path.lexists(target):
                    raise
                # Another process recovered it in between.
    except BaseException:
        recover(target)
        raise
    _clear_aside(new, target)


def _clear_aside(new: Path, target: Path) -> None:
    """Moves what stands aside, and is needed no more, beside the new one."""
    aside = _aside(target)
    if os.path.lexists(aside) and os.path.lexists(target):
        aside.rename(Path(tempfile.mkdtemp(prefix="replaced.", dir=new.parent)) / "old")


def _aside(target: Path) -> Path:
    """Where a directory stands while another takes its place."""
    return target.with_name(f"{target.name}.being-replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
