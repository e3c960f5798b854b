"""Exits by number: how deep a token runs."""

from __future__ import annotations

import operator
from typing import Literal

from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import is_whole, shown

# Blocks to run; "full" are all of them, and the model's own head.
Exit = int | Literal["full"]


def resolve_exit(exit: Exit, blocks: int) -> int:
    """Blocks to run for an exit.

    Raises:
        UsageError: Not "full" or a whole number from 1 to the number of blocks.
    """
    if isinstance(exit, str) and exit == "full":
        return blocks
    if not is_whole(exit) or not 1 <= (depth := operator.index(exit)) <= blocks:
        raise UsageError(
            f"exit {shown(exit)} is outside this model's 1..{blocks}",
            hint=f"exits count blocks run: a number from 1 to {blocks}, or 'full'",
        )
    return depth
