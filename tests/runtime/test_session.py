"""What holds for a session whatever was done with it before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chain import build_chain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_FP32, LOGITS_INT8_RELATIVE

from ojfa_export.decoding.confidence import confidence
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import UsageError
from ojfa_export.verify.checks import language_head

BATCH = 3
MAX_LENGTH = 40  # beyond LongRoPE's switch length (32) and the sliding window (8)
NAMES = ["gpt2", "llama-gqa", "phi3-sliding-window", "phi3-longrope"]
QUANTISED = ["gpt2 int8", "llama-gqa int4"]

examples = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

token = st.integers(0, VOCAB_SIZE - 1)
few_tokens = st.lists(token, max_size=4)
many_tokens = st.lists(token, min_size=8, max_size=20)
advance = st.tuples(
    st.lists(few_tokens | many_tokens, min_size=BATCH, max_size=BATCH), st.integers(1, 4)
)
decode = st.tuples(st.just([[5]] * BATCH) | st.just([[9], [], [2]]), st.integers(1, 4))
rewind = st.tuples(st.integers(0, BATCH - 1), st.floats(0, 1))
programs = st.lists(advance | decode | rewind, min_size=1, max_size=8)


def poison(session) -> None:
    """Puts NaN wherever nothing that counts may lie: a step that reads it shows."""
    marks = session.watermarks
    executor = session._runner.executor
    for block in executor._cache:
        for array in executor.cache(block):
            for row in range(session.batch_size):
                array[row, :, marks[block, row] :] = np.nan
    for depth, waiting in session._runner.pending.items():
        for row in range(session.batch_size):
            waiting[row, : marks[depth, row]] = np.nan
            waiting[row, marks[depth - 1, row] :] = np.nan


def check_watermarks(session) -> None:
    marks = session.watermarks
    assert marks.shape == (session.spec.blocks, session.batch_size)
    assert (np.diff(marks, axis=0) <= 0).all()
    assert (marks >= 0).all()
    assert (marks <= session.lengths).all()


def fresh_logits(chain, token_ids: list[int], exit: Any) -> np.ndarray:
    """Of a new session that runs all tokens at once."""
    return chain.session(1, MAX_LENGTH).advance(token_ids, exit)[0]


def fitting(session, tokens: list[list[int]]) -> list[list[int]]:
    room = [session.max_length - length for length in session.lengths]
    return [ids[:count] for ids, count in zip(tokens, room, strict=True)]


def assert_near(chain, actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the rounding of what the chain's products multiply."""
    close = LOGITS_FP32
    if chain.weights is not None:
        close = LOGITS_INT8_RELATIVE * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, atol=close, rtol=0)


@pytest.mark.parametrize("name", [*NAMES, *QUANTISED])
@examples
@given(program=programs)
def test_logits_do_not_depend_on_the_past(name, chain_of, program):
    chain = chain_of(name)
    session = chain.session(BATCH, MAX_LENGTH)
    expected_tokens: list[list[int]] = [[] for _ in range(BATCH)]
    for first, second in [*program, ([[1]] * BATCH, chain.spec.blocks)]:
        poison(session)
        if isinstance(first, int):
            length = round(second * session.lengths[first])
            session.rewind(length, first)
            del expected_tokens[first][length:]
        else:
            new, exit = fitting(session, first), min(second, chain.spec.blocks)
            logits = session.advance(new, exit)
            for row, ids in enumerate(new):
                expected_tokens[row] += ids
                reference = (
                    fresh_logits(chain, expected_tokens[row], exit) if ids else np.zeros(VOCAB_SIZE)
                )
                assert_near(chain, logits[row], reference)
        check_watermarks(session)
        assert [session.tokens(row) for row in range(BATCH)] == expected_tokens


@pytest.mark.parametrize("name", [*NAMES, *QUANTISED])
@examples
@given(pieces=st.lists(few_tokens | many_tokens, min_size=1, max_size=6), exit=st.integers(1, 4))
def test_every_position_in_pieces(name, chain_of, pieces, exit):
    chain = chain_of(name)
    exit = min(exit, chain.spec.blocks)
    # LongRoPE gives the same logits for a position only on one side of its switch length.
    limit = chain.spec.rotary_switch or MAX_LENGTH
    session = chain.session(1, MAX_LENGTH)
    logits, ids = [], []
    for piece in pieces:
        piece = piece[: limit - len(ids)]
        ids += piece
        logits += session.advance(piece, exit, every_position=True)
    [expected] = chain.session(1, MAX_LENGTH).advance(ids, exit, every_position=True)
    assert_near(chain, np.concatenate(logits), expected)


def test_full_is_the_number_of_blocks(chain_of):
    chain = chain_of("llama-gqa")
    full = chain.session().advance([1, 2, 3], "full")
    np.testing.assert_array_equal(chain.session().advance([1, 2, 3], chain.spec.blocks), full)
    assert abs(chain.session().advance([1, 2, 3], chain.spec.blocks - 1) - full).max() > 0.1


def test_exit_logits_are_the_shortcut_and_the_head_in_float64(chain_of, rng):
    """The exit head applied to the hidden states that the blocks hand on."""
    chain = chain_of("llama-gqa")
    ids = rng.integers(VOCAB_SIZE, size=12).tolist()
    head = language_head(chain.checkpoint)
    for exit in range(1, chain.spec.blocks):
        session = chain.session()
        [logits] = session.advance(ids, exit, every_position=True)
        hidden = session._runner.pending[exit][0, : len(ids)]
        jumped = jump64(chain.shortcut, hidden.astype(np.float64))
        mean_square = (jumped**2).mean(axis=-1, keepdims=True)
        normed = jumped / np.sqrt(mean_square + chain.spec.norm_epsilon) * head.norm.weight
        expected = normed @ head.weight.astype(np.float64).T
        np.testing.assert_allclose(logits, expected, atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama-gqa", "residual"), ("llama-gqa", "mlp"), ("gpt2", "mlp")]
)
def test_each_row_of_a_batch_has_the_jump_of_its_own_exit(name, kind, rng, tmp_path):
    """A policy stops rows at different exits; each must read the head as a session alone does."""
    checkpoint = make_checkpoint(name, tmp_path / "checkpoint", seed=int(rng.integers(2**31)))
    chain = build_chain(checkpoint, tmp_path, kind=kind)
    exits = range(1, chain.spec.blocks)
    prompts = rng.integers(VOCAB_SIZE, size=(6, 9)).tolist()
    alone = np.array([[chain.session().advance(ids, exit)[0] for ids in prompts] for exit in exits])
    tops = confidence(alone.reshape(-1, VOCAB_SIZE), "top").reshape(alone.shape[:2])
    policy = ExitPolicy(
        exits=tuple(exits), measure="top", thresholds=tuple(np.median(tops, axis=1).tolist())
    )
    step = chain.session(6).decide(prompts, policy)
    assert len(set(step.blocks_run.tolist())) > 1
    for row, blocks_run in enumerate(step.blocks_run):
        if blocks_run < chain.spec.blocks:
            expected = alone[blocks_run - 1, row]
            np.testing.assert_allclose(step.logits[row], expected, atol=LOGITS_FP32, rtol=0)


def jump64(shortcut, hidden: np.ndarray) -> np.ndarray:
    scale, shift, down, up = (
        np.asarray(getattr(shortcut, part), np.float64) for part in ("scale", "shift", "down", "up")
    )
    return (hidden * scale + shift) @ down @ up


WRONG_CALLS = {
    "token below": ([[1], [-1]], "full", "token ids outside"),
    "token above": ([[1], [2, VOCAB_SIZE]], "full", "token ids outside"),
    "no room": ([[1], [1] * MAX_LENGTH], "full", "the cache holds 40"),
    "too few rows": ([[1]], "full", "for 1 sequences, the session has 2"),
    "one flat row": ([1, 2], "full", "for 1 sequences, the session has 2"),
    "too many rows": ([[1], [2], [3]], "full", "for 3 sequences, the session has 2"),
    "exit 0": ([[1], [2]], 0, "1..4"),
    "exit beyond": ([[1], [2]], 5, "1..4"),
    "exit negative": ([[1], [2]], -1, "1..4"),
    "exit true": ([[1], [2]], True, "1..4"),
    "exit fraction": ([[1], [2]], 2.0, "1..4"),
    "exit word": ([[1], [2]], "foo", "'foo'"),
    "exit none": ([[1], [2]], None, "1..4"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_refused_call_changes_nothing(case, chain_of):
    tokens, exit, message = WRONG_CALLS[case]
    chain = chain_of("llama-gqa")
    session, twin = (chain.session(2, MAX_LENGTH) for _ in range(2))
    for each in (session, twin):
        each.advance([[3, 4, 5], [6]], 2)
        each.advance([[7], [8]], 1)
    with pytest.raises(UsageError, match=message):
        session.advance(tokens, exit)
    assert_equal_state(session, twin)


@pytest.mark.parametrize(
    ("length", "row", "message"),
    [(5, 0, "can't rewind to 5"), (-1, 0, "can't rewind to -1"), (0, 2, "row 2"), (0, -1, "row")],
)
def test_a_refused_rewind_changes_nothing(length, row, message, chain_of):
    chain = chain_of("llama-gqa")
    session, twin = (chain.session(2, MAX_LENGTH) for _ in range(2))
    for each in (session, twin):
        each.advance([[3, 4, 5, 6], [7, 8, 9, 10, 11]], 2)
    with pytest.raises(UsageError, match=message):
        session.rewind(length, row)
    assert_equal_state(session, twin)


def assert_equal_state(session, twin) -> None:
    assert session.lengths == twin.lengths
    assert [session.tokens(row) for row in range(2)] == [twin.tokens(row) for row in range(2)]
    np.testing.assert_array_equal(session.watermarks, twin.watermarks)
    next_tokens = [[1, 2], [3]]
    np.testing.assert_array_equal(session.advance(next_tokens), twin.advance(next_tokens))


@pytest.mark.parametrize("block", [0, 1, 3])
@pytest.mark.parametrize("depth_before", [1, 4])
def test_an_interrupted_step_can_be_taken_back(block, depth_before, chain_of, monkeypatch):
    chain = chain_of("llama-gqa")
    session = chain.session(2, MAX_LENGTH)
    session.advance([[3, 4, 5], [6]], depth_before)
    executor = session._runner.executor
    run = executor.run

    def interrupted(blocks, *args, **kwargs):
        if block in blocks:
            run(range(blocks.start, block), *args, **kwargs)
            raise KeyboardInterrupt
        return run(blocks, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.advance([[7], [8]])
    check_watermarks(session)
    session.rewind(3, 0)
    session.rewind(1, 1)
    poison(session)
    logits = session.advance([[9], [10]])
    for row, ids in enumerate(([3, 4, 5, 9], [6, 10])):
        expected = fresh_logits(chain, ids, "full")
        np.testing.assert_allclose(logits[row], expected, atol=LOGITS_FP32, rtol=0)


def test_the_cache_can_be_filled_to_its_last_row(chain_of):
    session = chain_of("llama-gqa").session(1, 5)
    session.advance([1, 2, 3, 4])
    session.advance([5])
    with pytest.raises(UsageError, match="would have 6 tokens"):
        session.advance([6])
    session.advance([])
    assert session.lengths == [5]


def test_numpy_token_ids(chain_of):
    chain = chain_of("llama-gqa")
    expected = chain.session().advance([1, 2, 3])
    np.testing.assert_array_equal(chain.session().advance(np.array([1, 2, 3])), expected)
    np.testing.assert_array_equal(chain.session().advance(np.array([[1, 2, 3]])), expected)


def test_returned_logits_and_watermarks_are_the_callers(chain_of):
    session = chain_of("llama-gqa").session()
    logits = session.advance([1, 2, 3])
    kept = logits.copy()
    session.watermarks[:] = 0
    session.advance([4])
    np.testing.assert_array_equal(logits, kept)
    assert (session.watermarks == 4).all()


@pytest.mark.parametrize("name", NAMES)
@examples
@given(
    pieces=st.lists(st.tuples(few_tokens | many_tokens, st.integers(1, 4)), max_size=4),
    depths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_deepening_gives_what_a_fresh_session_gives(name, chain_of, pieces, depths):
    chain = chain_of(name)
    session, ids = chain.session(1, MAX_LENGTH), []
    for piece, exit in pieces:
        [piece] = fitting(session, [piece])
        ids += piece
        session.advance(piece, min(exit, chain.spec.blocks))
    for depth in depths:
        depth = min(depth, chain.spec.blocks)
        poison(session)
        waiting = len(ids) - session.watermarks[depth - 1, 0]
        logits = session.deepen(depth)
        expected = fresh_logits(chain, ids, depth) if waiting else np.zeros(VOCAB_SIZE)
        np.testing.assert_allclose(logits[0], expected, atol=LOGITS_FP32, rtol=0)
        assert (session.watermarks[:depth] == len(ids)).all()
        check_watermarks(session)


def test_deepening_every_position_of_a_batch(chain_of):
    chain = chain_of("llama-gqa")
    session = chain.session(3, MAX_LENGTH)
    ids = [[1, 2, 3], [4], [5]]
    session.advance(ids, 1)
    logits = session.deepen(every_position=True)
    for row, result in zip(ids, logits, strict=True):
        [expected] = chain.session().advance(row, every_position=True)
        np.testing.assert_allclose(result, expected, atol=LOGITS_FP32, rtol=0)
    assert [len(result) for result in session.deepen(every_position=True)] == [0, 0, 0]
