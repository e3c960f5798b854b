"""Kinds of shortcut in the names of test cases."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["narrow", "residual", "mlp", "block"]


def split_kind(name: str) -> tuple[str, Kind]:
    """Of the name of a case: the variant of a tiny model, and the kind of its shortcut."""
    for kind in get_args(Kind):
        if name.endswith(f"-{kind}"):
            return name.removesuffix(f"-{kind}"), kind
    return name, "narrow"
