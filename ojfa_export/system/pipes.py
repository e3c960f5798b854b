"""Reading what a user names on the command line: a plain file, or a pipe such as `<(command)`."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

from ojfa_export.system.files import read_regular

# Bytes of text at most: tokenizing more takes more memory than machines have.
LIMIT = 1 << 30
# Seconds that a pipe may be silent: someone who waits longer should know for what.
PATIENCE = 60.0
# Seconds within which somebody must open a pipe for writing, where nobody has.
CONNECTION = 5.0


def read_named(path: Path, limit: int = LIMIT, patience: float = PATIENCE) -> bytes:
    """Reads a plain file, or a pipe to its end.

    Args:
        path: What the user named.
        limit: Bytes that it may have.
        patience: Seconds that a pipe may be silent.

    Raises:
        OSError: It can't be read, is neither file nor pipe, or is larger, or the pipe gave nothing
            for too long.
    """
    if not stat.S_ISFIFO(path.stat().st_mode):
        return read_regular(path, limit)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return _read_pipe(descriptor, path, limit, patience)
    finally:
        os.close(descriptor)


def _read_pipe(descriptor: int, path: Path, limit: int, patience: float) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    # Without a writer a pipe seems to be at its end, until the first one has come and gone.
    alone_until = time.monotonic() + min(CONNECTION, patience)
    silent_until = time.monotonic() + patience
    data = bytearray()
    while True:
        try:
            piece = os.read(descriptor, 1 << 20)
        except BlockingIOError:
            alone_until, piece = 0.0, None  # somebody has it open, and writes nothing just now
        if piece:
            data += piece
            silent_until = time.monotonic() + patience
            if len(data) > limit:
                raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
            continue
        hung_up = any(event & select.POLLHUP for _, event in poll.poll(0))
        if piece == b"" and (data or hung_up or time.monotonic() > alone_until):
            return bytes(data)
        if time.monotonic() > silent_until:
            raise OSError(
                errno.ETIMEDOUT, f"it is a pipe that gave nothing for {patience:g} s", str(path)
            )
        poll.poll(100)
