"""Text as people read it on a terminal: safe, and sizes and durations in short."""

from __future__ import annotations

import re
from typing import TextIO

# What a terminal obeys instead of showing it: control characters (C0 but tab and newline, DEL and
# C1), and those that turn the direction of the text around them.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe_for(stream: TextIO, text: str) -> str:
    r"""The text as it may go to a stream: on a terminal, its commands as visible escapes.

    Names, prompts and what a model writes come from others, and a terminal would obey what is in
    them: `\x1b[2J` would clear it. In files and pipes text stays as it is.
    """
    return _COMMANDS.sub(_escaped, text) if stream.isatty() else text


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def readable_bytes(count: float) -> str:
    """A size as people read it: 1 kB is 1000 bytes."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def readable_seconds(seconds: float) -> str:
    """A duration as people read it: "4.1 s", "12 s", "3 min 20 s", "1 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
