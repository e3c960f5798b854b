"""A text read many tokens at a time, against deciding token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_policy import threshold
from test_session import MAX_LENGTH, NAMES, examples, fresh_logits, token
from tiny_models import VOCAB_SIZE
from tolerances import LOGITS_FP32, NEAR_TIE

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.drift import read
from ojfa_export.promises.drift.read import read_text
from ojfa_export.promises.drift.unit import request_unit
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.shadow import Shadow


def every_token() -> Shadow:
    return Shadow(1.0, np.random.default_rng(0))


@pytest.mark.parametrize("name", NAMES)
@examples
@given(
    ids=st.lists(token, min_size=1, max_size=MAX_LENGTH),
    thresholds=st.dictionaries(st.integers(1, 3), threshold, max_size=3),
    at_once=st.sampled_from([3, 7, 128]),
)
def test_reading_is_deciding(name, chain_of, monkeypatch, ids, thresholds, at_once):
    monkeypatch.setattr(read, "_TOKENS_AT_ONCE", at_once)
    chain = chain_of(name)
    exits = tuple(sorted(exit for exit in thresholds if exit < chain.spec.blocks))
    policy = ExitPolicy(
        exits=exits, measure="top", thresholds=tuple(thresholds[exit] for exit in exits)
    )
    unit = read_text(chain.session(1, MAX_LENGTH), ids, policy, every_token())
    told: list[Any] = []
    session = Session(chain.spec, chain.engines, 1, MAX_LENGTH, every_token())
    session.on_event = told.append
    for each in ids:
        session.decide([each], policy)
    session.run_shadow_checks()
    expected = request_unit(told, policy)
    close = [
        (abs(expected.confidence[:, i] - limit) < 3e-4).any()
        for i, limit in enumerate(policy.thresholds)
    ]
    if any(close):  # float32's rounding may decide
        return
    np.testing.assert_array_equal(unit.blocks_run, expected.blocks_run)
    # Rounded down to float16: numbers that differ by the logits' tolerance may be a step apart.
    np.testing.assert_allclose(
        unit.confidence, expected.confidence, rtol=2.0**-10, atol=2 * LOGITS_FP32
    )
    ties = sum(near_tie(chain, ids[: i + 1], depth) for i, depth in enumerate(unit.blocks_run))
    assert abs(unit.loss - expected.loss) * len(ids) <= ties + 1e-9


def near_tie(chain: Any, ids: list[int], depth: int) -> bool:
    if depth == chain.spec.blocks:
        return False
    for logits in (fresh_logits(chain, ids, int(depth)), fresh_logits(chain, ids, "full")):
        second, first = np.sort(logits)[-2:]
        if first - second < NEAR_TIE:
            return True
    return False


def test_the_loss_is_of_the_chosen_tokens(chain_of, rng):
    chain = chain_of("llama-gqa")
    ids = rng.integers(VOCAB_SIZE, size=MAX_LENGTH).tolist()
    policy = ExitPolicy(exits=(1,), measure="top", thresholds=(0.0,))
    early, full = (
        chain.session().advance(ids, depth, every_position=True)[0].argmax(axis=1)
        for depth in (1, "full")
    )
    chooser = Shadow(0.4, np.random.default_rng(5))
    chosen = np.array([chooser.choose() for _ in ids])
    unit = read_text(chain.session(), ids, policy, Shadow(0.4, np.random.default_rng(5)))
    assert unit.loss == pytest.approx((early != full)[chosen].mean())
    assert 0 < chosen.sum() < len(ids)


def test_a_text_of_which_nothing_is_chosen(chain_of):
    policy = ExitPolicy(exits=(1,), measure="top", thresholds=(0.0,))
    shadow = Shadow(1e-9, np.random.default_rng(0))
    unit = read_text(chain_of("gpt2").session(), [1, 2, 3], policy, shadow)
    assert unit.loss is None
    assert unit.blocks_run.tolist() == [1, 1, 1]
