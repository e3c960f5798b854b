"""What each step of a training looks at: drawn from the seed and the step's number alone.

So that a training that was killed goes on with the very draws that it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        outputs: Of the jump, rising.
        tokens: [n, 2] row and position of those that count, in order.
    """

    windows: Int32
    outputs: list[int]
    tokens: Int32


def draw(
    seed: int,
    step: int,
    sizes: Sizes,
    training: Int32,
    length: int,
    given: int,
    outputs: Sequence[int],
) -> Draw:
    """Draws a step.

    Args:
        seed: Of the training.
        step: Its number, from 0.
        sizes: Of a step.
        training: Indices of the windows to train on.
        length: Tokens of a window.
        given: First tokens of a window that don't count.
        outputs: That the jump learns from.
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
        draw_outputs(rng, outputs, sizes.outputs),
        np.stack([rows, positions + given], axis=1).astype(np.int32),
    )


def draw_outputs(rng: np.random.Generator, outputs: Sequence[int], count: int) -> list[int]:
    """One output from each of `count` parts of all; the parts of early ones are no larger."""
    parts = np.array_split(np.array(outputs[::-1]), count)
    return sorted(int(rng.choice(part)) for part in parts)


def held_out_positions(
    seed: int, windows: int, length: int, given: int, tokens: int, together: bool = False
) -> Int32:
    """Which tokens of each held-out window are measured, `tokens` in all.

    Args:
        seed: Of the training.
        windows: How many.
        length: Tokens of each.
        given: First tokens of a window that don't count.
        tokens: Wanted.
        together: Whether those of a window must be one after the other.

    Returns:
        [windows, p], rising in each.
    """
    rng = np.random.default_rng([_HELD_OUT, seed])
    each = max(1, min(length - given, tokens // windows))
    if together:
        starts = rng.integers(given, length - each, size=(windows, 1), endpoint=True)
        return (starts + np.arange(each)).astype(np.int32)
    found = [rng.choice(length - given, each, replace=False) for _ in range(windows)]
    return (np.sort(np.stack(found), axis=1) + given).astype(np.int32)


def _windows(seed: int, step: int, rows: int, training: Int32) -> Int32:
    """The step's windows: each pass over the text has an order of its own."""
    steps_a_pass = len(training) // rows
    turn, place = divmod(step, steps_a_pass)
    order = np.random.default_rng([_WINDOWS, seed, turn]).permutation(training)
    return order[place * rows : (place + 1) * rows]
