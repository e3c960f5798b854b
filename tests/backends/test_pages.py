"""Pages of the KV cache: what slots have, share and give back, as a model in plain lists has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

SLOTS, CAPACITY = 4, 300


class PagesAgainstContents(RuleBasedStateMachine):
    """Each slot's tokens are written through the table, and must be read back by it."""

    def __init__(self) -> None:
        super().__init__()
        from ojfa_export.backends.cuda.device import the_device
        from ojfa_export.backends.passes import Chunk
        from ojfa_export.backends.tensorrt.attention import PAGE
        from ojfa_export.backends.tensorrt.pages import PageTable

        self.chunk, self.page, self.device = Chunk, PAGE, the_device()
        self.pages = PageTable(self.device, SLOTS, CAPACITY)
        self.memory = np.full((self.pages.count, PAGE), -1)
        self.contents: list[list[int]] = [[] for _ in range(SLOTS)]
        self.written = 0

    def table(self) -> np.ndarray:
        """As the device has it."""
        self.device.synchronize()
        array = self.pages._on_device
        return np.asarray(array)

    def copy(self, copies) -> None:
        for source, target in copies:
            self.memory[target] = self.memory[source]

    @rule(slot=st.integers(0, SLOTS - 1), back=st.integers(0, 90), count=st.integers(1, 150))
    def write(self, slot: int, back: int, count: int) -> None:
        """Some tokens, perhaps in place of the last ones."""
        start = max(0, len(self.contents[slot]) - back)
        count = min(count, CAPACITY - start)
        if not count:
            return
        self.copy(self.pages.make_ready([self.chunk(slot, start, count)]))
        new = list(range(self.written, self.written + count))
        self.written += count
        self.contents[slot][start:] = new
        table = self.table()
        for position, value in enumerate(new, start):
            self.memory[table[slot, position // self.page], position % self.page] = value

    @rule(slot=st.integers(0, SLOTS - 1))
    def release(self, slot: int) -> None:
        self.pages.release(slot)
        self.contents[slot] = []

    @precondition(lambda self: any(self.contents))
    @rule(data=st.data())
    def share(self, data) -> None:
        source = data.draw(st.sampled_from([i for i in range(SLOTS) if self.contents[i]]))
        target = data.draw(st.sampled_from([i for i in range(SLOTS) if i != source]))
        count = data.draw(st.integers(1, len(self.contents[source])))
        self.copy(self.pages.share(source, target, count))
        self.contents[target] = self.contents[source][:count]

    @invariant()
    def every_slot_reads_what_was_written(self) -> None:
        table = self.table()
        for slot, wanted in enumerate(self.contents):
            found = [
                int(self.memory[table[slot, position // self.page], position % self.page])
                for position in range(len(wanted))
            ]
            assert found == wanted

    @invariant()
    def no_page_is_lost(self) -> None:
        held = {page for pages in self.pages._held for page in pages}
        assert len(held) + self.pages.free == self.pages.count
        assert not held & set(self.pages._free)
        for page in held:
            assert self.pages._owners[page] == sum(page in each for each in self.pages._held)


@pytest.fixture
def machine(driver):
    """The stand-in's driver."""
    return PagesAgainstContents


def test_pages_of_slots(machine):
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings(max_examples=40, deadline=None))


def test_an_empty_cache_says_so(driver):
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.passes import Chunk
    from ojfa_export.backends.tensorrt.pages import PageTable
    from ojfa_export.errors import BackendError

    pages = PageTable(the_device(), 2, 128, pages=3)
    pages.make_ready([Chunk(0, 0, 128)])
    with pytest.raises(BackendError, match="no page left for slot 1: all 3"):
        pages.make_ready([Chunk(1, 0, 65)])
    pages.release(0)
    pages.make_ready([Chunk(1, 0, 65)])
