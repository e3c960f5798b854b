"""Memory of keys and values, counted in pages of tokens."""

from __future__ import annotations

import re

from ojfa_export.errors import UsageError
from ojfa_export.models.spec import ModelSpec

PAGE_TOKENS = 32
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_bytes(value: int | str) -> int:
    """A size in bytes, of a number or of text such as "4GiB".

    Raises:
        UsageError: Neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", value.upper())
        if match and (size := int(float(match[1]) * _UNITS[match[2] or ""])) > 0:
            return size
    raise UsageError(
        f"a size in bytes must be a positive number or text such as '4GiB', not {value!r:.40}"
    )


def page_bytes(spec: ModelSpec, element_bytes: int = 4) -> int:
    """Keys and values of a page of tokens, of all blocks."""
    return 2 * spec.blocks * spec.kv_heads * spec.head_dim * element_bytes * PAGE_TOKENS


class PageBudget:
    """Pages in use, by owner.

    Args:
        pages: How many there are.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._held: dict[object, int] = {}
        self.used = 0

    def missing(self, owner: object, tokens: int) -> int:
        """Pages that must become free before an owner may have so many tokens."""
        more = pages_of(tokens) - self._held.get(owner, 0)
        return max(0, more - (self.pages - self.used))

    def hold(self, owner: object, tokens: int) -> None:
        """Gives an owner pages for so many tokens; never fewer than it has."""
        before = self._held.get(owner, 0)
        after = max(before, pages_of(tokens))
        self._held[owner] = after
        self.used += after - before

    def move(self, owner: object, new: object) -> None:
        """Gives an owner's pages to another."""
        self._held[new] = self._held.pop(owner, 0)

    def release(self, owner: object) -> None:
        """Takes an owner's pages back."""
        self.used -= self._held.pop(owner, 0)


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)
