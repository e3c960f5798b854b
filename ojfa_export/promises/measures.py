"""How sure an exit is of its token: three measures, each larger where the exit is surer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding import confidence
from ojfa_export.decoding.confidence import Measure

MEASURES: tuple[Measure, ...] = ("top", "margin", "entropy")


def confidences(logits: NDArray[Any]) -> NDArray[np.float64]:
    """All measures of an exit's distributions.

    Args:
        logits: [n, V], V >= 2.

    Returns:
        [3, n] in the order of MEASURES: the top token's probability, its lead over the second's,
        and the entropy in nats **negated**, so that for each measure more is surer.
    """
    return confidence.confidences(logits, MEASURES)


def round_down(values: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """The largest float16 that is not above each value.

    A comparison `value >= threshold` with a float16 threshold comes out alike before and after.
    """
    rounded = values.astype(np.float16)
    above = rounded.astype(values.dtype) > values
    down = np.nextafter(rounded, np.float16(-np.inf))
    result: NDArray[np.float16] = np.where(above, down, rounded)
    return result


def round_up(values: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """The smallest float16 that is not below each value."""
    result: NDArray[np.float16] = -round_down(-values)
    return result
