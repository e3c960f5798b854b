"""Writes docs/runtimes.md: `python -m tests.both_runtimes.list`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from both_runtimes.names import cpp_names, python_names
from both_runtimes.placed import CPP_ONLY, PYTHON_ONLY, RENAMED, called_alike

FILE = Path(__file__).parents[2] / "docs" / "runtimes.md"
HEAD = """# What each runtime has

Written by `python -m tests.both_runtimes.list` from the Python interface and the C++ headers; a
test fails where it is out of date. Random operations go through both runtimes in CI and must give
the same (`tests/both_runtimes`). `name(parameter)` is a parameter.

What a bundle has from the checkpoint's generation_config.json (temperature, top-k, top-p, min-p,
repetition penalty, tokens that are never chosen; `ojfa-export inspect` shows them) is followed in
Python alone. C++ generates by its options and nothing else, greedily where they are left out.
End-of-text tokens are followed in both.
"""


class Unplaced(Exception):
    """A name that is nowhere, in two places, or that no runtime has."""


def document(python: Sequence[str], cpp: Sequence[str]) -> str:
    """The list as Markdown.

    Raises:
        Unplaced: Names that `placed.py` doesn't place, or places twice, or that aren't there.
    """
    pairs: dict[str, tuple[str, ...]] = {}
    for name in python:
        alike = called_alike(name, set(cpp))
        if name in RENAMED:
            pairs[name] = RENAMED[name]
        elif alike is not None:
            pairs[name] = (alike,)
    in_cpp = {name for names in pairs.values() for name in names}
    _check("Python", python, pairs.keys(), PYTHON_ONLY)
    _check("C++", cpp, in_cpp, CPP_ONLY)
    unknown = [*(RENAMED.keys() - set(python)), *(in_cpp - set(cpp))]
    if unknown:
        raise Unplaced(f"no runtime has: {', '.join(sorted(unknown))}")
    parts = [
        HEAD,
        _table("In both", ("Python", "C++"), pairs.items()),
        _table("In Python alone", ("Name", "Why"), PYTHON_ONLY.items()),
        _table("In C++ alone", ("Name", "Why"), CPP_ONLY.items()),
    ]
    return "\n".join(parts)


def _check(
    runtime: str, names: Sequence[str], shared: Iterable[str], alone: dict[str, str]
) -> None:
    shared = set(shared)
    # A parameter of what is in one alone needs no reason of its own; one of a shared owner does.
    owners = alone.keys() | {"Session::generate", "Session::generate_batch", "Model::load"}
    owners |= {"Model::session"}  # whose parameters are structs of options, listed by themselves
    nowhere = [
        name
        for name in names
        if name not in shared and name not in alone and re.sub(r"\(.*", "", name) not in owners
    ]
    twice = sorted(shared & alone.keys())
    gone = sorted(alone.keys() - set(names))
    for wrong, what in (
        (nowhere, "not placed"),
        (twice, "in both, and in one alone"),
        (gone, "gone"),
    ):
        if wrong:
            raise Unplaced(f"{what} in {runtime}: {', '.join(wrong)}; see placed.py")


def _table(
    title: str, columns: tuple[str, str], rows: Iterable[tuple[str, str | tuple[str, ...]]]
) -> str:
    lines = [f"## {title}", "", f"| {columns[0]} | {columns[1]} |", "|---|---|"]
    for name, other in rows:
        said = other if isinstance(other, str) else ", ".join(f"`{each}`" for each in other)
        lines.append(f"| `{name}` | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(document(python_names(), cpp_names()), encoding="utf-8")
