"""Tokens that run before anybody has seen them."""

from __future__ import annotations

import pytest

from ojfa_export.runtime.sequence import UNKNOWN, Sequence, expecting

BLOCKS = 4


def sequences() -> list[Sequence]:
    both = [Sequence(slot, BLOCKS) for slot in range(2)]
    for each in both:
        each.append([5, 6, 7])
        each.marks.raise_to(3, 2)
    return both


def test_an_expected_token_runs_and_is_taken_later():
    first, second = sequences()
    with expecting([first, second]):
        assert first.tokens == second.tokens == [5, 6, 7, UNKNOWN]
        for each in (first, second):
            assert each.pending(2) == 1
            each.marks.raise_to(len(each), 2)
    first.append([8])
    assert (first.tokens, first.marks[1], first.expected) == ([5, 6, 7, 8], 4, False)
    first.append([9, 10])
    assert (first.tokens, first.pending(2)) == ([5, 6, 7, 8, 9, 10], 2)
    second.drop_expected()
    assert (second.tokens, second.marks[1], second.expected) == ([5, 6, 7], 3, False)
    second.drop_expected()
    assert second.tokens == [5, 6, 7]


def test_tokens_that_the_host_knows():
    first, second = sequences()
    with expecting([first, second], [8, 0]):
        assert (first.tokens[-1], second.tokens[-1]) == (8, 0)
    first.append([8])
    second.truncate(1)
    assert first.tokens == [5, 6, 7, 8]
    second.append([9])
    assert second.tokens == [5, 9]


def test_nothing_is_expected_where_the_pass_fails():
    both = sequences()

    def fail() -> None:
        with expecting(both):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [each.tokens for each in both] == [[5, 6, 7]] * 2
    assert not any(each.expected for each in both)
