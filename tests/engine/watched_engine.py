"""An engine that checks what must hold after every pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ojfa_export.engine.budget import pages_of
from ojfa_export.engine.engine import Engine
from ojfa_export.engine.running import Running
from ojfa_export.runtime.sequence import Sequence


class WatchedEngine(Engine):
    """Fails its requests where an invariant is broken.

    Attributes:
        on_pass: Called with the number of passes before a pass is handed out.
        passes: Handed out so far.
        ahead: Those of them that were launched before the pass before them was handed out.
        unseen: Those of these whose tokens only the device knew.
    """

    def __init__(self, *args, **options) -> None:
        self.on_pass: Callable[[int], None] = lambda passes: None
        self.passes = self.ahead = self.unseen = 0
        self._owners: dict[Sequence, Running] = {}
        super().__init__(*args, **options)

    def _work(self, work) -> None:
        super()._work(work)
        for each in self._admission.running:
            assert not each.sequence.expected, "a token that nobody gave"
        self.check()

    def _follow(self, before):
        following = super()._follow(before)
        if following:
            self.ahead += 1
            self.unseen += any(
                each.sequence.expected and each.sequence.tokens[-1] < 0
                for launched in following
                for each in launched.running
            )
        return following

    def _hand_out(self, launched) -> None:
        self.on_pass(self.passes)
        self.passes += 1
        self.check()
        super()._hand_out(launched)
        self.check()

    def check(self) -> None:
        sequences = [each.sequence for each in self._admission.running]
        left = list(self._admission.slots._left.values())
        slots = [each.slot for each in (*sequences, *left)]
        assert len(slots) == len(set(slots)), "a slot has two owners"
        assert sorted([*slots, *self._admission.slots._free]) == list(range(self.max_sequences))
        for each in (*sequences, *left):
            marks = [each.marks[block] for block in range(self.model.blocks)]
            assert all(shallow >= deep for shallow, deep in itertools.pairwise(marks))
            assert marks[0] <= len(each)
        held = self._budget._held
        assert set(held) == {*sequences, *left}, "pages of nobody"
        assert self._budget.used == sum(held.values()) <= self._budget.pages
        for each in sequences:
            assert held[each] >= pages_of(each.marks[0], self._size.page_tokens)
        self.check_tokens(left)

    def check_tokens(self, left: list[Sequence]) -> None:
        """What is in the cache, and may serve others, is what requests were or will be given."""
        self._owners |= {each.sequence: each for each in self._admission.running}
        assert not any(each.expected for each in left)
        for sequence in (*left, *(each.sequence for each in self._admission.running)):
            owner = self._owners[sequence]
            request = owner.request
            if request.options.speculate:
                continue  # its drafts are there too
            new = [*request._tokens, *(token for token, _ in owner._untold)]
            given = [*request.prompt_token_ids, *(token.id for token in new)]
            known = len(sequence) - sequence.expected
            assert sequence.tokens[:known] == given[:known]

    def assert_everything_was_given_back(self) -> None:
        assert not self._admission.running
        assert not self._admission.waiting
        while self._admission.slots._left:
            self._admission.slots._drop_oldest()
        assert self._budget.used == 0
        assert len(self._admission.slots._free) == self.max_sequences
