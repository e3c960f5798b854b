"""Random changes of JSON values, most of them hostile."""

from __future__ import annotations

from typing import Any

import numpy as np

Rng = np.random.Generator


def pick(rng: Rng, items: list[Any]) -> Any:
    """One of them."""
    return items[rng.integers(len(items))]


def change_a_value(fields: dict[str, Any], rng: Rng) -> str:
    """Changes a random value, removes or adds a field, or doubles a list's entry; tells which."""
    owner, key, where = random_place(fields, rng)
    old = owner[key]
    new = other_value(old, rng)
    if new is REMOVED:
        del owner[key]
    else:
        owner[key] = new
    return f"{where}: {str(old)[:60]!r} became {str(new)[:60]!r}"


REMOVED = object()


def random_place(node: Any, rng: Rng) -> tuple[Any, Any, str]:
    """A container in a JSON value, and a key or index of it: depth first, level by level."""
    where = "manifest"
    while True:
        key = pick(rng, list(node) if isinstance(node, dict) else list(range(len(node))))
        where += f"/{key}"
        child = node[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.1:
            return node, key, where
        node = child


def other_value(old: Any, rng: Rng) -> Any:
    """Another value in its place, or REMOVED."""
    choices: list[Any] = [
        REMOVED,
        None,
        [],
        {},
        "",
        "x",
        -1,
        0,
        1e308,
        True,
        2**31,
        10**30,
        [[]],
        "../x",
    ]
    match old:
        case bool():
            choices += [not old] * 5
        case int():
            choices += [old + 1, old - 1, -old, float(old) + 0.5, str(old), 2 * old + 1]
        case float():
            choices += [old + 1, -old, float("inf"), old * 1.0001 + 1e-9]
        case str():
            choices += [old + " ", old[:-1], old.upper() + "A", f"../{old}", f"/{old}", [old]]
        case list():
            choices += [old[1:], [*old, *old[-1:], 1], [*old[::-1], 0], {}]
        case dict():
            choices += [{**old, "unknown": 1}] * 5
    return pick(rng, [each for each in choices if each is REMOVED or each != old])
