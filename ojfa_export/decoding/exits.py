"""Exits by number: how deep a token runs."""

from __future__ import annotations

import operator
from typing import Literal

from ojfa_export.errors import UsageError

# Blocks to run; "full" are all of them, and the model's own head.
Exit = int | Literal["full"]


def resolve_exit(exit: Exit, blocks: int) -> int:
    """Blocks to run for an exit.

    Raises:
        UsageError: Not "full" or a whole number from 1 to the number of blocks.
    """
    if isinstance(exit, str) and exit == "full":
        return blocks
    try:
        depth = 0 if isinstance(exit, bool) else operator.index(exit)  # NumPy's integers too
    except TypeError:
        depth = 0
    if not 1 <= depth <= blocks:
        raise UsageError(
            f"exit {exit!r} is outside this model's 1..{blocks}",
            hint=f"exits count blocks run: a number from 1 to {blocks}, or 'full'",
        )
    return depth
