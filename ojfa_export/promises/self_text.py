"""A promise on what the model writes: how many windows it takes, and how they are divided.

Each window is one draw of the writing. Where half begin with the chat template and half with a
text, both splits have as many of the one as of the other, so that the mean loss is that of the
writing. The bet of `p_values.betting` needs no more: with means m_i that differ, the mean wealth is
the product of 1 + b (limit - m_i), which by the inequality of arithmetic and geometric means is 1
at most where the mean of the m_i is the limit or more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.bundle.promise import Limits
from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CalibrationError
from ojfa_export.promises.windows import TUNING_SHARE, PromiseWindows, most_needed

DOMAIN = "self-text"
# Windows that are written unless told otherwise: this many, or this many times what certification
# needs at the least.
LEAST_WRITTEN, TIMES_NEEDED = 64, 4


def windows_to_write(asked: int | None, limits: Limits, kinds: int) -> int:
    """How many windows the model writes.

    Args:
        asked: By the user.
        limits: What is to be promised.
        kinds: Ways in which windows begin, 1 or 2.

    Raises:
        CalibrationError: Fewer are asked for than the promise needs at the least.
    """
    needed = most_needed(limits)
    windows = max(LEAST_WRITTEN, TIMES_NEEDED * needed) if asked is None else asked
    if _certified(windows, kinds) >= needed:
        return windows
    enough = next(n for n in range(needed, 4 * needed + 8) if _certified(n, kinds) >= needed)
    raise CalibrationError(
        f"{windows} windows of self-text are too few for the promise: at most "
        f"{limits.max_disagreement:g} disagreement with confidence {limits.confidence:g} needs "
        f"{enough}, even if no token differs",
        hint=f"use --self-text-windows {enough} or more, twice as many rather, or promise less",
    )


def divide(windows: Int32, parts: Sequence[int], kinds: int, given: int) -> PromiseWindows:
    """Divides what the model wrote: of each way to begin the first windows are for tuning.

    Args:
        windows: [n, length] token ids.
        parts: Windows of each batch, n in all; the ways to begin take turns.
        kinds: Ways in which windows begin, 1 or 2.
        given: First tokens of each window that don't count.
    """
    ends = np.cumsum(parts)
    batches = [windows[end - size : end] for end, size in zip(ends, parts, strict=True)]
    each = [np.concatenate(batches[kind::kinds]) for kind in range(kinds)]
    count = min(map(len, each))
    tuned = _tuned(count)
    return PromiseWindows(
        (DOMAIN,),
        (np.concatenate([some[:tuned] for some in each]),),
        (np.concatenate([some[tuned:count] for some in each]),),
        given,
    )


def _tuned(windows: int) -> int:
    """Of one way to begin, for tuning."""
    return max(1, int(TUNING_SHARE * windows))


def _certified(windows: int, kinds: int) -> int:
    """Of so many windows, for certification."""
    each = windows // kinds
    return kinds * (each - _tuned(each))
