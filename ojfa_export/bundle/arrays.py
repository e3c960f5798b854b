"""Arrays of a shortcut, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def check_arrays(owner: object, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses arrays that a shortcut can't have.

    Args:
        owner: Whose attributes they are.
        expected: Shapes by name; all are fp32.

    Raises:
        ValueError: One of another shape or dtype, or with values that are not finite.
    """
    for name, shape in expected.items():
        check_array(name, getattr(owner, name), shape)


def check_array(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuses an array that a shortcut can't have.

    Args:
        name: Named in errors.
        array: To be fp32.
        shape: To have.

    Raises:
        ValueError: One of another shape or dtype, or with values that are not finite.
    """
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype}, expected float32")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are NaN or infinite")
