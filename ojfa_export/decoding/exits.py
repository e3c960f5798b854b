"""Exits by number: how deep a token runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import is_whole, shown

# Blocks to run; "full" are all of them, and the model's own head.
Exit = int | Literal["full"]


def resolve_exit(exit: Exit, blocks: int, served: Sequence[int] | None = None) -> int:
    """Blocks to run for an exit.

    Args:
        exit: As asked.
        blocks: Of the model.
        served: The exits before the last block that there are; None for all.

    Raises:
        UsageError: Not "full" or a whole number from 1 to the number of blocks, or none that is
            served.
    """
    if isinstance(exit, str) and exit == "full":
        return blocks
    if not is_whole(exit) or not 1 <= (depth := operator.index(exit)) <= blocks:
        raise UsageError(
            f"exit {shown(exit)} is outside this model's 1..{blocks}",
            hint=f"exits count blocks run: a number from 1 to {blocks}, or 'full'",
        )
    if depth < blocks:
        check_served((depth,), served)
    return depth


def check_served(exits: Sequence[int], served: Sequence[int] | None) -> None:
    """Refuses exits that there are not.

    Args:
        exits: Before the last block.
        served: Those that there are; None for all.

    Raises:
        UsageError: Naming those.
    """
    if served is None:
        return
    for exit in exits:
        if exit not in served:
            there = ", ".join(map(str, served))
            raise UsageError(
                f"exit {exit} is none of this bundle's: its block jump serves {there}",
                hint=f"ask for one of {there}, or for 'full'",
            )


def nearest_exit(depth: int, served: Sequence[int] | None = None) -> int:
    """The exit that is nearest to a depth before the last block; the shallower of two.

    Args:
        depth: Blocks run.
        served: The exits that there are; none where nothing is known of them.
    """
    if not served:
        return max(1, depth)
    return min(served, key=lambda exit: abs(exit - depth))
