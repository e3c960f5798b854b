"""Opening files that others wrote: plain files only, and no more of them than is sensible.

A pipe, a device or a socket under a file's name would be read for ever, and merely opening a pipe
waits for a writer. So nothing is waited for, and type and size are known before a byte is read.
"""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def open_regular(path: Path, *, follow: bool = True) -> FileIO:
    """Opens a plain file for reading; unbuffered.

    Args:
        path: The file.
        follow: Whether it may be a link to one.

    Raises:
        OSError: It can't be opened, or is no plain file.
    """
    descriptor = os.open(path, FLAGS if follow else FLAGS | os.O_NOFOLLOW)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(f"{path} is no plain file")
        return FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path) -> None:
    """Makes sure that a path leads to a plain file that can be opened.

    Raises:
        OSError: It can't be opened, or is no plain file.
    """
    open_regular(path).close()


def read_regular(path: Path, limit: int) -> bytes:
    """Reads a plain file whole.

    Args:
        path: The file.
        limit: Bytes that it may have.

    Raises:
        OSError: It can't be read, is no plain file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(f"{path} has {size} bytes, more than the {limit} that it may have")
        pieces, room = [], limit + 1
        while room and (piece := file.read(min(room, 1 << 20))):  # it may grow meanwhile
            pieces.append(piece)
            room -= len(piece)
    if not room:
        raise OSError(f"{path} has more than the {limit} bytes that it may have")
    return b"".join(pieces)
