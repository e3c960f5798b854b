"""Paths as text: on Linux names are bytes, and the libraries take UTF-8 alone."""

from __future__ import annotations

import os
from pathlib import Path

from ojfa_export.errors import UsageError


def readable(name: str | Path) -> str:
    r"""A name for messages and documents; a byte that is no UTF-8 is written as "\xff"."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def check_utf8(path: Path) -> None:
    """Refuses a place whose files the libraries that run a model can't open.

    Raises:
        UsageError: A name on the way from the root to it is not UTF-8.
    """
    try:
        str(path.resolve()).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"{readable(path)} can't be used: the path {readable(path.resolve())} is not UTF-8",
            hint="use another path, or rename what is not UTF-8 in it",
        ) from None


def named(path: Path) -> Path:
    """The same place by a path that ends in a name, which "." and ".." are not."""
    return path.resolve() if path.name in ("", "..") else path
