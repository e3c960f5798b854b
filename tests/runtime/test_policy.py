"""Exits decided per token: confidence, which exit is taken, and that nothing is approximated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_session import (
    BATCH,
    MAX_LENGTH,
    NAMES,
    assert_equal_state,
    check_watermarks,
    examples,
    few_tokens,
    fitting,
    fresh_logits,
    many_tokens,
    poison,
    rewind,
)
from tiny_models import VOCAB_SIZE
from tolerances import CONFIDENCE, LOGITS_FP32

from ojfa_export.decoding.confidence import confidence
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import UsageError

MEASURES = ["top", "margin", "entropy"]


def confidence64(logits: np.ndarray, measure: str) -> float:
    """Of one row, in float64."""
    log = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    if measure == "entropy":
        return float(np.sum(np.exp(log) * log))
    second, first = np.sort(np.exp(log))[-2:]
    return first - second if measure == "margin" else first


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4, 1e37])
def test_confidence_is_float64s(measure, scale, rng):
    logits = (scale * rng.normal(size=(20, 50))).astype(np.float32)
    before = logits.copy()
    expected = [confidence64(row, measure) for row in logits]
    given = confidence(logits, measure)
    assert given.dtype == np.float64
    np.testing.assert_allclose(given, expected, atol=CONFIDENCE, rtol=0)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("measure", MEASURES)
def test_larger_is_surer(measure, rng):
    logits = np.outer([0.1, 0.5, 1, 2, 4, 8], rng.normal(size=30)).astype(np.float32)
    assert (np.diff(confidence(logits, measure)) > 0).all()


@pytest.mark.parametrize(
    ("exits", "thresholds", "message"),
    [
        ((1, 2), (0.5,), "2 exits and 1 thresholds"),
        ((2, 1), (0.5, 0.5), "not increasing"),
        ((1, 1), (0.5, 0.5), "not increasing"),
        ((0, 1), (0.5, 0.5), "not increasing from 1"),
        ((1,), (float("nan"),), "not all finite"),
        ((1,), (float("inf"),), "not all finite"),
    ],
)
def test_policies_that_make_no_sense(exits, thresholds, message):
    with pytest.raises(UsageError, match=message):
        ExitPolicy(exits=exits, measure="top", thresholds=thresholds)


def test_policies_of_the_wrong_types():
    with pytest.raises(UsageError, match="measure of an exit policy"):
        ExitPolicy(exits=(1,), measure="hope", thresholds=(0.5,))
    with pytest.raises(UsageError, match="more of an exit policy"):
        ExitPolicy(exits=(1,), measure="top", thresholds=(0.5,), more=1)


def test_a_policy_for_a_deeper_model_changes_nothing(chain_of):
    chain = chain_of("llama-gqa")
    session, twin = (chain.session(2, MAX_LENGTH) for _ in range(2))
    for each in (session, twin):
        each.advance([[3, 4, 5], [6]], 2)
    policy = ExitPolicy(exits=(1, 4), measure="top", thresholds=(0.5, 0.5))
    with pytest.raises(
        UsageError, match=r"exit 4 of the exit policy is outside this model's 1\.\.3"
    ):
        session.decide([[1], [2]], policy)
    good = ExitPolicy(exits=(1,), measure="top", thresholds=(0.5,))
    with pytest.raises(UsageError, match="token ids outside"):
        session.decide([[1], [VOCAB_SIZE]], good)
    assert_equal_state(session, twin)


# Confidences of the tiny models lie on both sides of these.
threshold = st.sampled_from([0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 1.1])
decide = st.tuples(
    st.lists(few_tokens | many_tokens, min_size=BATCH, max_size=BATCH)
    | st.just([[5]] * BATCH)
    | st.just([[9], [], [2]]),
    st.dictionaries(st.integers(1, 3), threshold, max_size=3),
)


@pytest.mark.parametrize("name", NAMES)
@examples
@given(program=st.lists(decide | rewind, min_size=1, max_size=10))
def test_whatever_the_exits_before_a_token_has_its_depths_logits(name, chain_of, program):
    """Logits are those of a fresh session that runs all tokens to that depth at once."""
    chain = chain_of(name)
    blocks = chain.spec.blocks
    session = chain.session(BATCH, MAX_LENGTH)
    ids: list[list[int]] = [[] for _ in range(BATCH)]
    for first, second in [*program, ([[1]] * BATCH, {})]:
        poison(session)
        if isinstance(first, int):
            session.rewind(round(second * session.lengths[first]), first)
            del ids[first][session.lengths[first] :]
            continue
        exits = sorted(exit for exit in second if exit < blocks)
        policy = ExitPolicy(exits=exits, measure="top", thresholds=[second[exit] for exit in exits])
        new = fitting(session, first)
        step = session.decide(new, policy)
        for row, added in enumerate(new):
            ids[row] += added
            if not added:
                assert step.blocks_run[row] == 0
                assert not step.logits[row].any()
                assert np.isnan(step.confidence[:, row]).all()
                continue
            depth = int(step.blocks_run[row])
            expected = fresh_logits(chain, ids[row], depth)
            np.testing.assert_allclose(step.logits[row], expected, atol=LOGITS_FP32, rtol=0)
            asked = [exit for exit in exits if exit <= depth]
            sure = step.confidence[: len(asked), row] >= policy.thresholds[: len(asked)]
            # The first sure exit is the one taken, and no deeper one was asked.
            assert sure.tolist() == [exit == depth for exit in asked]
            assert np.isnan(step.confidence[len(asked) :, row]).all()
            assert depth == blocks or sure[-1]
            assert (session.watermarks[:depth, row] == len(ids[row])).all()
        check_watermarks(session)


def test_every_sequence_exits_on_its_own_and_work_is_counted(chain_of, rng):
    chain = chain_of("llama-gqa")
    ids = rng.integers(VOCAB_SIZE, size=(8, 5)).tolist()
    asked = chain.session(8).decide(ids, ExitPolicy(exits=[2], measure="margin", thresholds=[9]))
    middle = float(np.median(asked.confidence))
    session = chain.session(8)
    policy = ExitPolicy(exits=(2, 3), measure="margin", thresholds=(middle, 9.0))
    step = session.decide(ids, policy)
    assert sorted(step.blocks_run.tolist()) == [2] * 4 + [4] * 4
    np.testing.assert_array_equal(step.blocks_run == 2, asked.confidence[0] > middle)
    assert session.stats.exits == {2: 4, 4: 4}
    assert session.stats.mean_blocks == 3
    assert (session.stats.checks, session.stats.exit_heads, session.stats.final_heads) == (
        12,
        12,
        4,
    )


def test_a_policy_without_exits_is_full_depth(chain_of):
    chain = chain_of("gpt2")
    step = chain.session().decide([1, 2, 3], ExitPolicy(exits=(), measure="top", thresholds=()))
    np.testing.assert_array_equal(step.logits, chain.session().advance([1, 2, 3]))
    assert step.confidence.shape == (0, 1)


def test_sequences_that_go_on_run_together(chain_of, monkeypatch):
    """One pass per block, whatever the sequences' lengths."""
    chain = chain_of("llama-gqa")
    session = chain.session(3, MAX_LENGTH)
    session.advance([[1, 2, 3], [4], [5, 6]])
    calls = []
    run = session._runner.executor.run

    def counted(blocks, hidden, chunks, **options):
        calls.extend((block, len(chunks)) for block in blocks)
        return run(blocks, hidden, chunks, **options)

    monkeypatch.setattr(session._runner.executor, "run", counted)
    policy = ExitPolicy(exits=(1, 3), measure="top", thresholds=(2.0, 2.0))
    step = session.decide([[7], [8], [9]], policy)
    assert calls == [(block, 3) for block in range(4)]
    for row, ids in enumerate(([1, 2, 3, 7], [4, 8], [5, 6, 9])):
        expected = fresh_logits(chain, ids, "full")
        np.testing.assert_allclose(step.logits[row], expected, atol=LOGITS_FP32, rtol=0)


def test_sequences_that_go_on_run_together_without_one_between_that_stopped(chain_of, monkeypatch):
    chain = chain_of("llama-gqa")
    prompts = [[1, 2, 3], [4], [5, 6]]
    ask = ExitPolicy(exits=(1,), measure="top", thresholds=(9.0,))
    for token in range(VOCAB_SIZE):  # whose middle sequence is the surest
        probe = chain.session(3, MAX_LENGTH)
        probe.advance(prompts)
        sure = probe.decide([[7], [token], [9]], ask).confidence[0]
        if sure.argmax() == 1:
            break
    between = ExitPolicy(
        exits=(1,), measure="top", thresholds=(float(sure[1] + max(sure[0], sure[2])) / 2,)
    )
    session = chain.session(3, MAX_LENGTH)
    session.advance(prompts)
    calls = []
    run = session._runner.executor.run

    def counted(blocks, hidden, chunks, **options):
        calls.extend((block, len(chunks)) for block in blocks)
        return run(blocks, hidden, chunks, **options)

    monkeypatch.setattr(session._runner.executor, "run", counted)
    poison(session)
    step = session.decide([[7], [token], [9]], between)
    assert step.blocks_run.tolist() == [4, 1, 4]
    assert calls == [(0, 3), *((block, 2) for block in (1, 2, 3))]
    assert session.watermarks[:, 1].tolist() == [2, 1, 1, 1]
    poison(session)
    for row, ids in enumerate(([1, 2, 3, 7], [4, token], [5, 6, 9])):
        expected = fresh_logits(chain, ids, int(step.blocks_run[row]))
        np.testing.assert_allclose(step.logits[row], expected, atol=LOGITS_FP32, rtol=0)
    logits = session.advance([[1], [1], [1]])
    for row, ids in enumerate(([1, 2, 3, 7, 1], [4, token, 1], [5, 6, 9, 1])):
        expected = fresh_logits(chain, ids, "full")
        np.testing.assert_allclose(logits[row], expected, atol=LOGITS_FP32, rtol=0)
