"""Keys that clients must send."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from ojfa_export.errors import UsageError

_LONGEST_FILE = 1 << 20


class Keys:
    """The keys of a server.

    Args:
        keys: None of them lets everybody in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def accept(self, authorization: bytes | None) -> bool:
        """Whether a header `Authorization: Bearer KEY` has one of them.

        All keys are compared, each in constant time, so that time tells nothing of them.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        given, found = _digest(key.strip()), False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found and scheme.lower() == b"bearer"


def read_keys(path: Path) -> tuple[str, ...]:
    """Reads a file of keys, one a line; empty lines and those that begin with # are none.

    Raises:
        UsageError: It has none, or is no text.
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        data = file.read(_LONGEST_FILE)
    try:
        lines = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8 text", hint="write one key a line") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"{path} has no key", hint="write one key a line")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
