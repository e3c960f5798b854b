"""`--exit`: blocks to run."""

from __future__ import annotations

from typing import Literal

import click

METAVAR = "full|N"
METAVAR_WITH_AUTO = "full|auto|N"


def parse_exit(value: str) -> int | Literal["full"]:
    """Reads "full" or a number; whether the model has that many blocks is seen when it is open."""
    if value == "full":
        return "full"
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is not 'full' or a number of blocks to run")
    return int(value)


def parse_exit_or_auto(value: str) -> int | Literal["full", "auto"]:
    """Reads what `parse_exit` does, or "auto"."""
    return "auto" if value == "auto" else parse_exit(value)
