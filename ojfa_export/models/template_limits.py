"""What a chat template may take: templates are code of strangers, and may loop for ever.

Time is looked at where a template can go on without end: at each item of a loop and at each call.
One operation that would take for ever by itself, such as a power, is limited by the size of what it
gives. It is the thread's own time, so that a busy machine refuses nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.nodes import Template

# Of computing. A long chat takes some milliseconds.
SECONDS = 2.0
# Bits of a number, and items of a repeated text or list.
_MOST_BITS, _MOST_ITEMS = 1 << 16, 1 << 20
_WATCH = "watched"


class TooMuch(Exception):
    """A template takes more than it may; says what."""


class _Meter(threading.local):
    """What is left to the template that this thread renders."""

    end = float("inf")

    def check(self) -> None:
        """Stops a template whose time is up."""
        if time.thread_time() > self.end:
            raise TooMuch(f"it takes more than {SECONDS:g} s")


_METER = _Meter()


@contextmanager
def metered() -> Iterator[None]:
    """Limits the time of what this thread renders inside."""
    _METER.end = time.thread_time() + SECONDS
    try:
        yield
    finally:
        _METER.end = float("inf")


class _Items:
    """What a loop goes over; it has a length where that has one, which templates read."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _METER.check()
            yield item


def limited_environment(**options: Any) -> Any:
    """Jinja's sandbox with these limits; its loops must be `watch`ed.

    Args:
        options: Of the environment.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Limited(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def watched(self, items: Any) -> Any:
            return _Items(items)

        def call(__self, __context: Any, __called: Any, *args: Any, **named: Any) -> Any:
            _METER.check()
            return super().call(__context, __called, *args, **named)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                _check_power(left, right)
            else:
                _check_product(left, right)
            return super().call_binop(context, operator, left, right)

    return Limited(**options)


def watch(tree: Template) -> Template:
    """The same template with loops that look at the time."""
    from jinja2 import nodes

    for loop in tree.find_all(nodes.For):
        asked = nodes.EnvironmentAttribute(_WATCH)
        loop.iter = nodes.Call(asked, [loop.iter], [], None, None).set_lineno(loop.lineno)
    return tree


def _check_power(left: Any, right: Any) -> None:
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and left.bit_length() * right > _MOST_BITS:
        raise TooMuch("it computes with huge numbers")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MOST_BITS:
            raise TooMuch("it computes with huge numbers")
        return
    for times, items in ((left, right), (right, left)):
        repeats = isinstance(times, int) and isinstance(items, str | list | tuple)
        if repeats and times * len(items) > _MOST_ITEMS:
            raise TooMuch("it makes a huge text or list")
