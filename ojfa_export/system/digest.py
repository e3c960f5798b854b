"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from io import FileIO
from pathlib import Path

from ojfa_export.system.files import open_regular

CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex digest of a plain file.

    Raises:
        OSError: It can't be read, or is no plain file.
    """
    with open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: FileIO) -> str:
    """Hex digest of an open file, read in pieces so that no more than 1 MiB is held."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()
