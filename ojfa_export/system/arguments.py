"""What callers give to the Python interface, checked: whatever is wrong is a UsageError.

Numbers of NumPy and of other libraries are taken where they are whole or real. True is no number,
and neither is "5".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ojfa_export.errors import UsageError

T = TypeVar("T")
# Characters of a value that a message shows.
_SHOWN = 60


def shown(value: object) -> str:
    """A value as messages show it, cut where it is long; also one that can't be printed."""
    try:
        text = " ".join(repr(value).split())  # arrays have lines
    except Exception:  # a number of 5,000 digits, or somebody's class
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def wrong(name: str, wanted: str, value: object, hint: str | None = None) -> UsageError:
    """The error of an argument that is something else than wanted."""
    return UsageError(f"{name} must be {wanted}, not {shown(value)}", hint)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    if type(value) is int:
        return True
    try:
        operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return False
    return not isinstance(value, bool)


def whole_number(
    name: str,
    value: Any,
    low: int | None = None,
    high: int | None = None,
    *,
    hint: str | None = None,
) -> int:
    """A whole number from `low` to `high`, both included.

    Args:
        name: What it is, for the message.
        value: As given.
        low: The least; None for any.
        high: The largest; None for any.
        hint: What to do where it is none.

    Raises:
        UsageError: Something else, or out of range.
    """
    if not is_whole(value):
        raise wrong(name, "a whole number", value, hint)
    number = operator.index(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise wrong(name, _range(low, high), number, hint)
    return number


def real_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above_low: bool = False,
    wanted: str | None = None,
    hint: str | None = None,
) -> float:
    """A finite number from `low` to `high`, both included.

    Args:
        name: What it is, for the message.
        value: As given.
        low: The least.
        high: The largest.
        above_low: Whether `low` itself is too low.
        wanted: What it must be, for the message; by default the range in words.
        hint: What to do where it is none.

    Raises:
        UsageError: Something else, not finite, or out of range.
    """
    number = _float(value)
    if number is None:
        raise wrong(name, wanted or "a number", value, hint)
    if not (math.isfinite(number) and low <= number <= high) or (above_low and number == low):
        raise wrong(name, wanted or _range(low, high), value, hint)
    return number


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        UsageError: Something else.
    """
    if not isinstance(value, bool):
        raise wrong(name, "True or False", value)
    return value


def instance(name: str, value: Any, kind: type[T], *, hint: str | None = None) -> T:
    """An object of a class.

    Raises:
        UsageError: Something else.
    """
    if not isinstance(value, kind):
        raise wrong(name, f"of type {kind.__name__}", value, hint)
    return value


def listed(name: str, value: Any, read: Callable[[Any], T], wanted: str = "a list") -> list[T]:
    """The values of a list, a tuple, an array or the like, each as `read` takes it.

    Raises:
        UsageError: Something else.
    """
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise wrong(name, wanted, value)
    try:
        values = list(value)
    except TypeError:  # NumPy's arrays without a dimension
        raise wrong(name, wanted, value) from None
    return [read(each) for each in values]


def text(name: str, value: Any) -> str:
    """Text of whole characters.

    Raises:
        UsageError: Something else.
    """
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(name, "text in UTF-8", value, "give a str of whole characters") from None
    return value


def _float(value: object) -> float | None:
    """A number that isn't complex, a truth value or text; None for anything else."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    is_other = isinstance(value, bool | str | bytes | bytearray) or bool(shape)
    if is_other or getattr(dtype, "kind", "f") in ("b", "c") or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except Exception:
        return None


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return "a whole number" if low is None else f"{low} or more"
    if high == math.inf:
        return "finite" if low == -math.inf else f"finite and {low:g} or more"
    return f"{high:g} or less" if low is None else f"between {low:g} and {high:g}"
