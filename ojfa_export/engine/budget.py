"""Memory of keys and values, counted in pages of tokens."""

from __future__ import annotations

import operator
import re

from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.arguments import is_whole, wrong

# Of a page, where the cache itself has none.
PAGE_TOKENS = 32
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_bytes(value: int | str) -> int:
    """A size in bytes, of a number or of text such as "4GiB".

    Raises:
        UsageError: Neither.
    """
    if is_whole(value) and (size := operator.index(value)) > 0:  # type: ignore[arg-type]
        return size
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?B)?\s*", value.upper())
        if match and (size := int(float(match[1]) * _UNITS[match[2] or ""])) > 0:
            return size
    raise wrong("a size in bytes", "a positive number or text such as '4GiB'", value)


def page_bytes(spec: ModelSpec, element_bytes: int = 4, page_tokens: int = PAGE_TOKENS) -> int:
    """Keys and values of a page of tokens, of all blocks."""
    return 2 * spec.blocks * spec.kv_heads * spec.head_dim * element_bytes * page_tokens


class PageBudget:
    """Pages in use, by owner.

    Args:
        pages: How many there are.
        page_tokens: Tokens that one holds.
    """

    def __init__(self, pages: int, page_tokens: int = PAGE_TOKENS) -> None:
        self.pages, self.page_tokens = pages, page_tokens
        self._held: dict[object, int] = {}
        self.used = 0

    def missing(self, owner: object, tokens: int) -> int:
        """Pages that must become free before an owner may have so many tokens."""
        more = self._pages_of(tokens) - self._held.get(owner, 0)
        return max(0, more - (self.pages - self.used))

    def covers(self, owner: object, tokens: int) -> bool:
        """Whether an owner has pages for so many tokens."""
        return tokens <= self._held.get(owner, 0) * self.page_tokens

    def hold(self, owner: object, tokens: int) -> None:
        """Gives an owner pages for so many tokens; never fewer than it has."""
        before = self._held.get(owner, 0)
        after = max(before, self._pages_of(tokens))
        self._held[owner] = after
        self.used += after - before

    def move(self, owner: object, new: object) -> None:
        """Gives an owner's pages to another."""
        self._held[new] = self._held.pop(owner, 0)

    def release(self, owner: object) -> None:
        """Takes an owner's pages back."""
        self.used -= self._held.pop(owner, 0)

    def _pages_of(self, tokens: int) -> int:
        return pages_of(tokens, self.page_tokens)


def pages_of(tokens: int, page_tokens: int = PAGE_TOKENS) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_tokens)
