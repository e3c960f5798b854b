"""Memory of keys and values, counted in pages of tokens."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ojfa_export.backends.backend import Engines, PagedCache
from ojfa_export.backends.draft import DraftEngines
from ojfa_export.errors import UsageError
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


@dataclass(frozen=True)
class CacheSize:
    """How large a KV cache is, for all requests together.

    Attributes:
        pages: How many there are.
        page_tokens: Tokens that one holds, of a sequence that asks no exit with a block behind it.
        exit_share: What such an exit's keys and values take, of what the model's do.
    """

    pages: int
    page_tokens: int
    exit_share: float = 0.0

    def tokens(self, exits: int = 0) -> int:
        """That it holds, of sequences that ask so many exits with a block behind each."""
        return math.floor(self.pages * self.page_tokens / (1 + exits * self.exit_share))

    def takes(self, tokens: int, exits: int) -> int:
        """How many tokens of a sequence without such exits take as much memory as these."""
        return math.ceil(tokens * (1 + exits * self.exit_share))

    def needed(self, lengths: Iterable[int]) -> int:
        """Pages of sequences of some lengths that share none."""
        return sum(-(-length // self.page_tokens) for length in lengths)

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        engines: Engines,
        sequences: int,
        length: int,
        limit: int | str | None,
        drafts: DraftEngines | None = None,
    ) -> CacheSize:
        """Of a number of sequences of some length, or less by a limit.

        Args:
            spec: The model.
            engines: Its engines, which may have pages of their own.
            sequences: At most.
            length: Tokens of each at most.
            limit: Bytes, a number or text; None for none.
            drafts: The draft layer, whose cache and states count as well.

        Raises:
            UsageError: The limit is no size, or smaller than a page.
        """
        behind = engines.exit_blocks
        paged = engines if isinstance(engines, PagedCache) else None
        page_tokens = paged.page_tokens if paged else PAGE_TOKENS
        size = page_bytes(spec, paged.cache_element_bytes if paged else 4, page_tokens)
        share = 0.0 if behind is None else page_tokens * behind.token_bytes / size
        most = cls(0, page_tokens, share).takes(length, 0 if behind is None else len(behind.exits))
        pages, beside = sequences * pages_of(most, page_tokens), 0
        if drafts is not None and drafts.takes_whole:
            beside = sequences * length * drafts.token_bytes
        elif drafts is not None:
            size += page_tokens * drafts.token_bytes
        if limit is not None:
            pages = min(pages, (read_bytes(limit) - beside) // size)
        if pages <= 0:
            also = f", and the draft layer {beside} for {sequences} sequences" if beside else ""
            raise UsageError(
                f"kv-cache-bytes {limit!r} holds no page of {page_tokens} tokens",
                hint=f"a page takes {size} bytes{also}",
            )
        return cls(pages, page_tokens, share)

    def fits(self, tokens: int, exits: int = 0) -> bool:
        """Whether a request of so many tokens has room when it is alone."""
        return pages_of(self.takes(tokens, exits), self.page_tokens) <= self.pages


class PageBudget:
    """Pages in use, by owner.

    Args:
        size: Of the cache.
    """

    def __init__(self, size: CacheSize) -> None:
        self.pages, self.page_tokens = size.pages, size.page_tokens
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
