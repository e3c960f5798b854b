"""The GPU runtime against the CPU runtime: the same logits whatever the policy and the order."""

from __future__ import annotations

import numpy as np
import pytest
from gpu.cases import EXIT
from tolerances import LOGITS_FP16_RELATIVE, LOGITS_FP32

from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.runtime.sampling import Sampling
from ojfa_export.runtime.speculation import Speculation, Speculator

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _one_length_class(case, request):
    """LongRoPE's logits at a short length are not those of the whole text, which are expected."""
    if case.spec.rotary_switch is not None and request.node.originalname != "test_prefill":
        pytest.skip("LongRoPE: compared at the whole length")


def assert_close(case, actual, expected):
    tolerance = LOGITS_FP32
    if case.precision == "fp16":
        tolerance = LOGITS_FP16_RELATIVE * np.abs(expected).max()
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def test_prefill(case, decode):
    ids = case.expected["token_ids"]
    session = case.session(len(ids))
    for row, logits in enumerate(session.advance(ids.tolist(), EXIT, every_position=True)):
        assert_close(case, logits, case.expected["exit"][row])
    for row, logits in enumerate(session.deepen("full", every_position=True)):
        assert_close(case, logits, case.expected["full"][row])


def test_token_by_token(case, decode):
    """One recorded graph serves all positions, of sequences of different lengths too."""
    ids = case.expected["token_ids"]
    session = case.session(len(ids))
    start = 5
    session.advance([ids[0, :start].tolist(), ids[1, : start + 1].tolist()])
    for step in range(ids.shape[1] - start - 1):
        at = start + step
        logits = session.advance([[int(ids[0, at])], [int(ids[1, at + 1])]])
        assert_close(case, logits[0], case.expected["full"][0, at])
        assert_close(case, logits[1], case.expected["full"][1, at + 1])


@pytest.mark.parametrize("piece", [1, 2, 3, 4, 5])
def test_pieces(case, decode, piece):
    """Every number of tokens that the matrix-vector kernels take, and one more."""
    ids = case.expected["token_ids"][0]
    session = case.session()
    for at in range(0, len(ids), piece):
        [logits] = session.advance(ids[at : at + piece].tolist(), every_position=True)
        assert_close(case, logits, case.expected["full"][0, at : at + piece])


def test_exits_and_catching_up(case, decode, rng):
    ids = case.expected["token_ids"][0]
    session = case.session()
    session.advance(ids[:4].tolist(), EXIT)
    for at in range(4, len(ids)):
        if rng.random() < 0.6:
            logits = session.advance([int(ids[at])], EXIT)
            assert_close(case, logits[0], case.expected["exit"][0, at])
        else:
            logits = session.advance([int(ids[at])])
            assert_close(case, logits[0], case.expected["full"][0, at])


def test_rewinding(case, decode):
    ids = case.expected["token_ids"][0]
    session = case.session()
    session.advance(ids[:20].tolist())
    session.advance([1, 2, 3])
    session.rewind(20)
    logits = session.advance([int(ids[20])])
    assert_close(case, logits[0], case.expected["full"][0, 20])


def test_policy_and_speculation(case, decode):
    """Exits that are never sure, and drafts, end in the tokens of full depth."""
    prompt = case.expected["token_ids"][0, :8].tolist()
    plain = case.session()
    tokens, pending = [], prompt
    for _ in range(12):
        tokens.append(int(plain.advance(pending)[0].argmax()))
        pending = [tokens[-1]]
    policy = ExitPolicy(exits=(1, EXIT), measure="top", thresholds=(1.1, 1.1))
    decided, pending = [], prompt
    session = case.session()
    for _ in range(12):
        step = session.decide(pending, policy)
        decided.append(int(step.logits[0].argmax()))
        pending = [decided[-1]]
    assert decided == tokens
    speculator = Speculator(
        case.session(), Speculation(exit=EXIT, draft=3), Sampling(), [np.random.default_rng(0)]
    )
    drafted, pending = [], prompt
    while len(drafted) < 12:
        [chosen] = speculator.step([pending], [12 - len(drafted)])
        drafted += [each.id for each in chosen]
        pending = [drafted[-1]]
    if case.precision == "fp32":
        assert drafted[:12] == tokens
