"""The commit that a benchmark measured."""

from __future__ import annotations

import subprocess


def commit() -> str:
    """The commit of the working directory; "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
