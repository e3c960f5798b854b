"""The GPU runtime against the CPU runtime: the same logits whatever the policy and the order."""

from __future__ import annotations

import numpy as np
import pytest
from gpu.cases import EXIT
from tolerances import LOGITS_BF16_RELATIVE, LOGITS_FP16_RELATIVE, LOGITS_FP32, TWO_KERNELS

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.decoding import StepByStep
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.shadow import Shadow
from ojfa_export.runtime.speculator import Speculator

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _one_length_class(case, request):
    """LongRoPE's logits at a short length are not those of the whole text, which are expected."""
    if case.spec.rotary_switch is not None and request.node.originalname != "test_prefill":
        pytest.skip("LongRoPE: compared at the whole length")


def assert_close(case, actual, expected):
    tolerance = LOGITS_FP32
    if case.precision != "fp32":
        relative = {"fp16": LOGITS_FP16_RELATIVE, "bf16": LOGITS_BF16_RELATIVE}[case.precision]
        tolerance = relative * np.abs(expected).max()
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


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=30, top_p=0.9)])
def test_choices_are_those_of_the_logits(case, decode, rng, sampling):
    """At fixed exits and at checks of which some stop; two sessions in step, one by its logits."""
    device, host, apart = case.session(2), case.session(2), TWO_KERNELS[case.precision]
    pending = case.expected["token_ids"][:, :6].tolist()
    inner = device.exits
    for step in range(16):
        draws = rng.random(2).tolist()
        if step % 2:
            measure = ("top", "margin", "entropy")[step % 3]
            thresholds = rng.choice([-9.0, 9.0, 0.02 if measure != "entropy" else -5.0], len(inner))
            policy = ExitPolicy(exits=tuple(inner), measure=measure, thresholds=tuple(thresholds))
            said = host.decide(pending, policy)
            logits, blocks = said.logits, said.blocks_run.tolist()
            choice = device.choose(pending, policy, sampling, draws)
            assert choice.blocks_run == blocks
            np.testing.assert_allclose(choice.confidence, said.confidence, atol=apart, rtol=0)
        else:
            exit = int(rng.choice([*inner, case.spec.blocks]))
            logits = host.advance(pending, exit)
            choice = device.choose(pending, exit, sampling, draws)
        for row, token in enumerate(choice.tokens):
            if not sampling.temperature:
                assert logits[row].max() - logits[row, token] <= apart * np.abs(logits[row]).max()
                continue
            kept = sampling.probabilities(logits[row])
            high = kept[: token + 1].sum()
            # The least likely that are kept may be others there: their logits hardly differ.
            near = apart + 2 * kept[kept > 0].min()
            assert high - kept[token] - near <= draws[row] <= high + near
        pending = [[token] for token in choice.tokens]
    np.testing.assert_array_equal(device.watermarks, host.watermarks)


def test_shadow_checks_and_closed_heads(case, decode):
    """Early tokens are compared with the full model; heads are opened again after closing."""
    ids = case.expected["token_ids"][0]
    session = Session(case.spec, case.open(), 1, len(ids), Shadow(1.0, np.random.default_rng(1)))
    session.choose(ids[:4].tolist(), EXIT)
    for at in range(4, 20):
        session.choose([int(ids[at])], EXIT)
    session._engines.unload_heads()
    checks = session.run_shadow_checks()
    assert [check.position for check in checks] == list(range(3, 20))
    for check in checks:
        early, full = (case.expected[name][0, check.position] for name in ("exit", "full"))
        near = max(np.ptp(np.sort(each)[-2:]) for each in (early, full))
        assert (
            check.agrees == (early.argmax() == full.argmax())
            or case.precision != "fp32"
            or near < 1e-3
        )


@pytest.mark.parametrize("batch", [1, 2])
def test_steps_begun_ahead(case, decode, batch):
    """Text whose next step begins before the last token is known, against single steps."""
    prompts = case.expected["token_ids"][:batch, :6].tolist()
    for exit in (EXIT, case.spec.blocks):
        session, plain = case.session(batch), case.session(batch)
        generators = [np.random.default_rng(0)] * batch
        decoder = StepByStep(session, exit, Sampling(), generators)
        pending = expected = prompts
        for step in range(20):
            chosen = decoder.step(pending, [20 - step] * batch)
            pending = [[token.id for token in each] for each in chosen]
            logits = plain.advance(expected, exit)
            for row, [token] in enumerate(pending):
                near = TWO_KERNELS[case.precision] * np.abs(logits[row]).max()
                assert logits[row].max() - logits[row, token] <= near
            expected = pending
            if step == 12:
                pending = expected = [[7]] * batch
        decoder.end()
        assert session.tokens() == plain.tokens()
        assert session.watermarks.tolist() == plain.watermarks.tolist()
