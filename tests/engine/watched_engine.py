"""An engine that checks what must hold after every pass."""

from __future__ import annotations

import itertools

from ojfa_export.engine.budget import pages_of
from ojfa_export.engine.engine import Engine


class WatchedEngine(Engine):
    """Fails its requests where an invariant is broken."""

    def _work(self, work) -> None:
        super()._work(work)
        self.check()

    def check(self) -> None:
        sequences = [each.sequence for each in self._running]
        left = list(self._slots._left.values())
        slots = [each.slot for each in (*sequences, *left)]
        assert len(slots) == len(set(slots)), "a slot has two owners"
        assert sorted([*slots, *self._slots._free]) == list(range(self.max_sequences))
        for each in (*sequences, *left):
            marks = [each.marks[block] for block in range(self.model.blocks)]
            assert all(shallow >= deep for shallow, deep in itertools.pairwise(marks))
            assert marks[0] <= len(each)
        held = self._budget._held
        assert set(held) == {*sequences, *left}, "pages of nobody"
        assert self._budget.used == sum(held.values()) <= self._budget.pages
        for each in sequences:
            assert held[each] >= pages_of(each.marks[0])

    def assert_everything_was_given_back(self) -> None:
        assert not self._running
        assert not self._waiting
        while self._slots._left:
            self._slots._drop_oldest()
        assert self._budget.used == 0
        assert len(self._slots._free) == self.max_sequences
