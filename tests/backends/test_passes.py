"""Cutting a pass into pieces that run one after the other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ojfa_export.backends.passes import Chunk, cut_pass

chunks = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 90)), min_size=1, max_size=8)


@given(chunks=chunks, most=st.integers(1, 64))
def test_pieces_are_the_tokens_in_order(chunks, most):
    whole = [Chunk(slot, start, length) for slot, (start, length) in enumerate(chunks)]
    pieces = cut_pass(whole, most)
    assert all(sum(length for _, _, length in piece) == most for piece in pieces[:-1])
    assert 0 < sum(length for _, _, length in pieces[-1]) <= most
    assert all(length > 0 for piece in pieces for _, _, length in piece)

    def tokens(parts):
        return [(slot, start + i) for slot, start, length in parts for i in range(length)]

    assert [token for piece in pieces for token in tokens(piece)] == tokens(whole)
