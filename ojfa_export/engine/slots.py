"""Places in the KV cache, and what is left in them for requests that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ojfa_export.engine.budget import CacheSize, PageBudget
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence

# Fewer tokens in common are computed again: that costs less than looking after them.
LEAST_PREFIX = 16


class Slots:
    """Gives sequences their slots and pages, and takes them back.

    What a sequence leaves in its slot is kept as long as nobody needs the slot or its pages. A
    request whose prompt begins with the same tokens takes them over: in place where the slot is
    free, as a copy where its owner still runs.

    Args:
        runner: Has the cache.
        count: Slots.
        budget: Pages.
        size: Of the cache.
        capacity: Tokens of a slot.
        reuse: Whether to keep what sequences leave.
    """

    def __init__(
        self,
        runner: ModelRunner,
        count: int,
        budget: PageBudget,
        size: CacheSize,
        capacity: int,
        *,
        reuse: bool,
    ) -> None:
        self._runner, self._budget, self._capacity = runner, budget, capacity
        self._size = size
        self._reuse = reuse
        self._free = list(range(count - 1, -1, -1))
        self._left: OrderedDict[int, Sequence] = OrderedDict()  # by slot, oldest first

    def take(self, sequence: Sequence, running: Iterable[Sequence]) -> int | None:
        """Gives a sequence a slot, pages for its tokens, and what is known of its first tokens.

        Args:
            sequence: Without a slot.
            running: Sequences whose slots hold what they compute.

        Returns:
            Tokens that need not be computed; None where there is no slot or there are no pages.
        """
        donor, shared = self._best(sequence, running)
        in_place = donor is not None and donor.slot in self._left
        if in_place:
            assert donor is not None
            del self._left[donor.slot]
            self._budget.move(donor, sequence)
        needed = self._size.takes(len(sequence) + 1, len(sequence.asks))
        if not self._make_room(sequence, needed):
            if in_place:
                self._put_back(donor, sequence)
            return None
        if in_place:
            slot = donor.slot  # type: ignore[union-attr]
        elif (free := self._free_slot()) is None:
            return None
        else:
            slot = free
        self._budget.hold(sequence, needed)
        sequence.slot = slot
        if donor is not None:
            if not in_place:
                self._runner.copy_prefix(donor.slot, slot, shared)
            sequence.take_over(donor, shared)
        return shared

    def grow(self, sequence: Sequence, more: int = 0) -> bool:
        """Gives a sequence pages for all its tokens, and some more; False where there are none."""
        tokens = self._size.takes(len(sequence) + more, len(sequence.asks))
        if self._budget.covers(sequence, tokens):
            return True
        if not self._make_room(sequence, tokens):
            return False
        self._budget.hold(sequence, tokens)
        return True

    def give_back(self, sequence: Sequence, *, keep: bool) -> None:
        """Takes a sequence's slot; what is in it may be kept for others."""
        sequence.drop_expected()
        if keep and self._reuse and len(sequence) >= LEAST_PREFIX:
            self._left[sequence.slot] = sequence
            return
        self._budget.release(sequence)
        self._runner.release(sequence.slot)
        self._free.append(sequence.slot)

    def clear(self) -> None:
        """Drops all that was left."""
        while self._left:
            self._drop_oldest()

    def _best(self, sequence: Sequence, running: Iterable[Sequence]) -> tuple[Sequence | None, int]:
        """The sequence that has the most first tokens in common, and how many."""
        best: tuple[Sequence | None, int] = (None, 0)
        if not self._reuse:
            return best
        # One token must run, for its logits.
        most = len(sequence) - 1
        for other in (*self._left.values(), *running):
            if other.long_context != sequence.long_context:
                continue
            if sequence.drafting is not None and other.drafting is None:
                continue  # the states that a draft layer sees were not kept
            limit = min(most, other.marks[0])
            shared = _in_common(sequence.tokens, other.tokens, limit)
            if shared >= max(LEAST_PREFIX, best[1] + 1):
                best = other, shared
        return best

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Drops what was left, oldest first, until the pages are there."""
        while self._budget.missing(sequence, tokens):
            if not self._left:
                return False
            self._drop_oldest()
        return True

    def _free_slot(self) -> int | None:
        if not self._free and self._left:
            self._drop_oldest()
        return self._free.pop() if self._free else None

    def _drop_oldest(self) -> None:
        slot, sequence = self._left.popitem(last=False)
        self._budget.release(sequence)
        self._runner.release(slot)
        self._free.append(slot)

    def _put_back(self, donor: Sequence | None, sequence: Sequence) -> None:
        assert donor is not None
        self._budget.move(sequence, donor)
        self._left[donor.slot] = donor


def _in_common(first: list[int], second: list[int], limit: int) -> int:
    """How many of the first tokens are the same, up to a limit."""
    if first[:limit] == second[:limit]:
        return min(limit, len(first), len(second))
    pairs = zip(first[:limit], second[:limit], strict=False)
    return next(index for index, (a, b) in enumerate(pairs) if a != b)
