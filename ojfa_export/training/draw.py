"""What each step of a training looks at: drawn from the seed and the step's number alone.

So that a training that was killed goes on with the very draws that it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ojfa_export.decoding.arrays import Int32
from ojfa_export.training.sizes import Sizes

# What a random number is for: no two are the same.
_WINDOWS, _STEP, _HELD_OUT = 1, 2, 3


@dataclass(frozen=True)
class Draw:
    """What a step looks at.

    Attributes:
        windows: [rows] indices.
        exits: In order.
        tokens: [n, 2] row and position of those that count, in order.
    """

    windows: Int32
    exits: list[int]
    tokens: Int32


def draw(
    seed: int, step: int, sizes: Sizes, training: Int32, length: int, given: int, exits: int
) -> Draw:
    """Draws a step.

    Args:
        seed: Of the training.
        step: Its number, from 0.
        sizes: Of a step.
        training: Indices of the windows to train on.
        length: Tokens of a window.
        given: First tokens of a window that don't count.
        exits: L-1.
    """
    rng = np.random.default_rng([_STEP, seed, step])
    places = rng.choice(
        sizes.rows * (length - given),
        min(sizes.picked, sizes.rows * (length - given)),
        replace=False,
    )
    places.sort()
    rows, positions = np.divmod(places, length - given)
    return Draw(
        _windows(seed, step, sizes.rows, training),
        draw_exits(rng, exits, sizes.exits),
        np.stack([rows, positions + given], axis=1).astype(np.int32),
    )


def draw_exits(rng: np.random.Generator, exits: int, count: int) -> list[int]:
    """One exit from each of `count` parts of the depth; the parts of early ones are no larger."""
    parts = np.array_split(np.arange(exits, 0, -1), count)
    return sorted(int(rng.choice(part)) for part in parts)


def held_out_positions(seed: int, windows: int, length: int, given: int, tokens: int) -> Int32:
    """Which tokens of each held-out window are measured, `tokens` in all: [windows, p]."""
    rng = np.random.default_rng([_HELD_OUT, seed])
    each = max(1, min(length - given, tokens // windows))
    found = [rng.choice(length - given, each, replace=False) for _ in range(windows)]
    return (np.sort(np.stack(found), axis=1) + given).astype(np.int32)


def _windows(seed: int, step: int, rows: int, training: Int32) -> Int32:
    """The step's windows: each pass over the text has an order of its own."""
    steps_a_pass = len(training) // rows
    turn, place = divmod(step, steps_a_pass)
    order = np.random.default_rng([_WINDOWS, seed, turn]).permutation(training)
    return order[place * rows : (place + 1) * rows]
