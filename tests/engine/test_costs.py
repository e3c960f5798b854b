"""What the engine believes of pieces of prompts beside steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ojfa_export.engine.costs import FORGOTTEN, LEAST_PIECE, PieceCosts

SIZES = (64, 128, 256, 512)
# Milliseconds that passes filled up to these sizes add to a step of 5, as on an H200.
STEP, ADDED = 5.0, {64: 0.6, 128: 1.2, 256: 2.4, 512: 7.6}


def known(costs, others, added=ADDED):
    """Steps and passes of every size, the first of which took a hundred times as long."""
    for _ in range(3):
        costs.learn(others, 0, STEP)
    for size, more in added.items():
        for seconds in (100 * STEP, STEP + more, STEP + more):
            costs.learn(others, size - others, seconds)


def test_a_step_is_measured_alone_first():
    costs = PieceCosts(SIZES)
    for _ in range(2):
        assert costs.choose(8, 0.5) == 0
        costs.learn(8, 0, STEP)
    assert costs.choose(8, 0.5) == 64 - 8
    assert costs.choose(32, 0.5) == 0, "of many more requests nothing is known"


@pytest.mark.parametrize(
    ("share", "size"), [(0.1, 64), (0.2, 64), (0.3, 128), (0.5, 256), (2, 512)]
)
def test_the_largest_pass_that_adds_no_more_than_a_share(share, size):
    costs = PieceCosts(SIZES)
    known(costs, 8)
    assert costs.choose(8, share) == size - 8


def test_more_tokens_where_each_adds_less():
    """Where all slots are taken, within a larger share."""
    costs = PieceCosts(SIZES)
    known(costs, 50, {64: 1.0, 128: 2.1, 256: 4.0, 512: 7.0})
    assert costs.choose(50, 1.0) == costs.choose(50, 1.0, 1.3) == 256 - 50
    assert costs.choose(50, 1.0, 2.0) == 512 - 50
    costs = PieceCosts(SIZES)
    known(costs, 8)  # each of 512 adds more there
    assert costs.choose(8, 0.5, 2.0) == 256 - 8


def test_prompts_go_on_where_steps_cannot_be_measured():
    costs = PieceCosts(SIZES)
    assert any(costs.choose(8, 0.5) for _ in range(10))


def test_a_slow_pass_is_tried_again_after_a_while():
    costs = PieceCosts(SIZES)
    known(costs, 8, {**ADDED, 256: 100.0})
    assert costs.choose(8, 0.5) == 128 - 8
    for _ in range(FORGOTTEN + 1):
        costs.learn(8, 128 - 8, STEP + ADDED[128])
    assert costs.choose(8, 0.5) == 256 - 8


@given(
    passes=st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 600), st.floats(1e-6, 10.0)), max_size=60
    ),
    others=st.integers(1, 64),
    share=st.floats(0.1, 4),
    sizes=st.sampled_from([None, SIZES]),
)
def test_whatever_was_seen_pieces_are_of_a_size_that_there_is(passes, others, share, sizes):
    costs = PieceCosts(sizes)
    for each in passes:
        costs.learn(*each)
    chosen = costs.choose(others, share)
    assert chosen == 0 or LEAST_PIECE <= chosen <= costs.most
    for _ in range(2):
        costs.learn(others, 0, 1.0)
    assert costs.choose(others, share) > 0, "prompts go on"
