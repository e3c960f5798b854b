"""Watermarks kept as spans are watermarks kept one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ojfa_export.runtime.watermarks import Watermarks

BLOCKS = 7
raises = st.tuples(st.just("raise"), st.integers(0, 5), st.integers(1, BLOCKS))
lowers = st.tuples(st.just("lower"), st.integers(0, 30), st.just(0))


@given(program=st.lists(raises | lowers, max_size=30))
def test_spans_are_the_marks(program):
    marks, plain = Watermarks(BLOCKS), [0] * BLOCKS
    for what, number, depth in program:
        if what == "raise":
            mark = plain[0] + number  # a pass brings its blocks level with the sequence's end
            marks.raise_to(mark, depth)
            plain[:depth] = [mark] * depth
        else:
            marks.lower_to(number)
            plain = [min(number, each) for each in plain]
        assert [marks[block] for block in range(BLOCKS)] == plain
        for depth in range(BLOCKS + 1):
            spans = list(marks.spans(depth))
            assert [mark for blocks, mark in spans for _ in blocks] == plain[:depth]
            assert [block for blocks, _ in spans for block in blocks] == list(range(depth))
            values = [mark for _, mark in spans]
            assert values == sorted(set(values), reverse=True), "few spans: no mark stands twice"
            for mark in {*plain, number}:
                end = depth
                while end < BLOCKS and plain[end] == mark:
                    end += 1
                assert marks.end(depth, mark) == end
