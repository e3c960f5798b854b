"""The TensorRT backend's sessions on a stand-in for the GPU, against the CPU runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from chain import Chain, build_chain
from elements import split_precision
from shortcut_kinds import split_kind
from stand_in.late_driver import StandInDriver
from tiny_models import VOCAB_SIZE, make_checkpoint
from tolerances import CONFIDENCE, LOGITS_BF16_RELATIVE, LOGITS_FP16_RELATIVE, LOGITS_FP32

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.planning.turns import FOLLOWING, Turns
from ojfa_export.runtime.decoding import StepByStep
from ojfa_export.runtime.session import Session

MAX_LENGTH = 40


@dataclass
class Case:
    """A model with sessions of both backends."""

    chain: Chain
    driver: StandInDriver
    engines: object

    def session(self, batch: int = 1, shadow=None) -> Session:
        return Session(self.chain.spec, self.engines, batch, MAX_LENGTH, shadow)

    def reference(self, batch: int = 1, shadow=None) -> Session:
        return Session(self.chain.spec, self.chain.engines, batch, MAX_LENGTH, shadow)

    @property
    def exits(self) -> tuple[int, ...]:
        """Before the last block; blocks stand behind some alone."""
        return self.session().exits

    def depth(self, rng) -> int:
        """Any of them, or full depth."""
        return int(rng.choice([*self.exits, self.chain.spec.blocks]))


CASES = ["llama-gqa-mlp", "gpt2-residual", "gpt2-fp16", "qwen3", "smollm3-fp16"]
CASES += ["gemma2", "gemma3_text-bf16"]
# Exits are checked by a head of some tokens, also where blocks stand behind them.
CASES += ["stablelm-mlp checked", "llama-gqa checked", "qwen3-block checked"]


@pytest.fixture(scope="module", params=CASES)
def case(request, driver, tmp_path_factory):
    from ojfa_export.backends.tensorrt.backend import BACKEND

    directory = tmp_path_factory.mktemp(request.param)
    name, _, checked = request.param.partition(" ")
    name, precision = split_precision(name)
    variant, kind = split_kind(name)
    chain = build_chain(
        make_checkpoint(variant, directory / "checkpoint", seed=5),
        directory,
        precision=precision,
        max_length=MAX_LENGTH,
        kind=kind,
        check_tokens=np.arange(3, VOCAB_SIZE, 7, dtype=np.int32) if checked else None,
    )
    (directory / "built").mkdir()
    return Case(chain, driver, chain.open_on(BACKEND, directory / "built"))


def tolerance(case: Case, expected: np.ndarray) -> float:
    if case.chain.precision == "fp32":
        return LOGITS_FP32
    relative = {"fp16": LOGITS_FP16_RELATIVE, "bf16": LOGITS_BF16_RELATIVE}[case.chain.precision]
    return relative * float(np.abs(expected).max())


def assert_close(case: Case, actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance(case, expected), rtol=0)


def test_logits_token_by_token_at_any_exit(case, rng):
    session, reference = case.session(2), case.reference(2)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    assert_close(case, session.advance(prompts), reference.advance(prompts))
    for _ in range(12):
        exit = case.depth(rng)
        new = rng.integers(VOCAB_SIZE, size=(2, 1)).tolist()
        if rng.random() < 0.2:
            new[int(rng.integers(2))] = []
        assert_close(case, session.advance(new, exit), reference.advance(new, exit))
    np.testing.assert_array_equal(session.watermarks, reference.watermarks)


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_a_small_model_s_block_is_five_kernels(case, tokens):
    """In 16 bits, whether one token runs or several of a sequence; when they first do.

    And the kernels of norms that not every model has.
    """
    if case.chain.precision == "fp32":
        pytest.skip("16 bits alone run on tensor cores")
    session = case.session()
    session.advance([[1, 2, 3]])
    case.driver.launched.clear()
    session.advance([list(range(tokens))])
    spec = case.chain.spec
    normed = ["norm_queries_and_keys"] * (spec.qk_norm != "none")
    added = ["narrow_linear_8", *["add_normed"] * spec.norms_are("after")]
    block = ["norm_narrow_linear_8", *normed, "attention", *added, "norm_narrow_up_8", *added]
    wanted = ["embed", *block * spec.blocks]
    names = [name.removeprefix("wide_").removesuffix("_of_all") for name in case.driver.launched]
    launched, head = names[: len(wanted)], names[len(wanted) :]
    assert launched == wanted
    assert set(head) <= {"norm_narrow_linear_8", "graph"}  # recorded the second time


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 20, 0.9, seed=2)])
def test_choices_are_those_of_the_host(case, rng, batch, sampling):
    """Tokens and confidence, at fixed exits, and at exits that are checked in turn."""
    session, reference = case.session(batch), case.reference(batch)
    pending = [[1 + row, 2, 3] for row in range(batch)]
    for step in range(14):
        draws = rng.random(batch).tolist()
        exit: object = case.depth(rng)
        if step % 2:
            asked = sorted(rng.choice(case.exits, size=2, replace=False).tolist())
            measure = ("top", "margin", "entropy")[step % 3]
            probe = case.reference(batch)
            probe.advance([reference.tokens(row) for row in range(batch)])
            policy = ExitPolicy(exits=asked, measure=measure, thresholds=(9.0, 9.0))
            said = probe.decide(pending, policy).confidence
            # Between what the sequences say, so that some stop and some go on.
            thresholds = [
                float(said[i].mean()) if batch > 1 else rng.choice([-9.0, 9.0]) for i in (0, 1)
            ]
            exit = ExitPolicy(exits=asked, measure=measure, thresholds=thresholds)
        mine = session.choose(pending, exit, sampling, draws)
        theirs = reference.choose(pending, exit, sampling, draws)
        if case.chain.precision != "fp32":
            pending = [[token] for token in theirs.tokens]
            continue
        assert mine.blocks_run == theirs.blocks_run
        assert mine.tokens == theirs.tokens
        np.testing.assert_allclose(mine.confidence, theirs.confidence, atol=CONFIDENCE, rtol=0)
        pending = [[token] for token in theirs.tokens]
        if step == 9:
            for each in (session, reference):
                each.rewind(5, batch - 1)
    new = [[5]] * batch
    assert_close(case, session.advance(new), reference.advance(new))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 20, 0.9, seed=2)])
def test_steps_begun_ahead_change_nothing(case, rng, batch, sampling):
    """Token by token, with now and then another token than the one that was chosen, or none."""
    if case.chain.precision != "fp32":
        pytest.skip("tokens of 16 bits are not those of fp32")
    exit = case.depth(rng)
    sessions = case.session(batch), case.reference(batch)
    decoders = [
        StepByStep(each, exit, sampling, [sampling.generator(row) for row in range(batch)])
        for each in sessions
    ]
    started = []
    follow = sessions[0].follow
    sessions[0].follow = lambda *arguments: started.append(1) or follow(*arguments)
    pending = [[row + 1, 5, 6] for row in range(batch)]
    for step in range(20):
        mine, theirs = (each.step(pending, [20 - step] * batch) for each in decoders)
        assert mine == theirs
        assert sessions[0].tokens()[: sessions[1].lengths[0]] == sessions[1].tokens()
        pending = [[token.id for token in tokens] for tokens in theirs]
        if step % 5 == 3:
            pending[int(rng.integers(batch))] = [7]
        if step % 7 == 5 and batch > 1:
            pending[int(rng.integers(batch))] = []
    assert len(started) > 5
    for each in decoders:
        each.end()
    assert sessions[0].tokens() == sessions[1].tokens()
    np.testing.assert_array_equal(sessions[0].watermarks, sessions[1].watermarks)
    new = [[5]] * batch
    assert_close(case, sessions[0].advance(new), sessions[1].advance(new))


def deciding(case: Case, rng, batch: int) -> ExitPolicy:
    """Checks after some blocks that some tokens pass and some don't."""
    probe, exits = case.reference(batch), case.exits[:2]
    said = probe.decide(
        [[row + 1, 5, 6] for row in range(batch)],
        ExitPolicy(exits=exits, measure="margin", thresholds=(9.0, 9.0)),
    ).confidence
    thresholds = tuple(float(each * rng.uniform(0.5, 1.5)) for each in said.mean(axis=1))
    return ExitPolicy(exits=exits, measure="margin", thresholds=thresholds)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 20, 0.9, seed=2)])
def test_decided_steps_begun_ahead_change_nothing(case, rng, batch, sampling):
    """As above with exits that are checked; what was launched is replayed, and some is in vain."""
    if case.chain.precision != "fp32":
        pytest.skip("tokens of 16 bits are not those of fp32")
    policy = deciding(case, rng, batch)
    sessions = case.session(batch), case.reference(batch)
    decoders = [
        StepByStep(each, policy, sampling, [sampling.generator(row) for row in range(batch)])
        for each in sessions
    ]
    pending = [[row + 1, 5, 6] for row in range(batch)]
    for step in range(30):
        mine, theirs = (each.step(pending, [30 - step] * batch) for each in decoders)
        assert mine == theirs
        pending = [[token.id for token in tokens] for tokens in theirs]
        if step % 5 == 3:
            pending[int(rng.integers(batch))] = [7]
        if step % 7 == 5 and batch > 1:
            pending[int(rng.integers(batch))] = []
    for each in decoders:
        each.end()
    assert sessions[0].tokens() == sessions[1].tokens()
    mine, theirs = (each.stats for each in sessions)
    summed = CONFIDENCE * 30 * batch
    assert mine.confidence_sums == pytest.approx(theirs.confidence_sums, abs=summed)
    assert replace(mine, confidence_sums={}) == replace(theirs, confidence_sums={})
    np.testing.assert_array_equal(sessions[0].watermarks, sessions[1].watermarks)
    new = [[5]] * batch
    assert_close(case, sessions[0].advance(new), sessions[1].advance(new))


def test_a_step_that_was_interrupted_can_be_taken_again(case, rng, monkeypatch):
    """Steps at fixed and decided exits, of which launches fail now and then."""
    if case.chain.precision != "fp32":
        pytest.skip("tokens of 16 bits are not those of fp32")
    policy, greedy = deciding(case, rng, 1), Sampling()
    launch, failed = case.driver.cuGraphLaunch, []

    def failing(*arguments):
        if rng.random() < 0.2:
            failed.append(1)
            raise KeyboardInterrupt
        return launch(*arguments)

    monkeypatch.setattr(case.driver, "cuGraphLaunch", failing)
    session, reference = case.session(), case.reference()
    pending: list[list[int]] = [[1, 5, 6]]
    for _ in range(12):
        exit = policy if rng.random() < 0.7 else "full"
        mine = StepByStep(session, exit, greedy, [greedy.generator(0)])
        theirs = StepByStep(reference, exit, greedy, [greedy.generator(0)])
        for _ in range(3):
            if reference.lengths[0] == MAX_LENGTH - 1:
                return
            length = reference.lengths[0]
            expected = theirs.step(pending, [9])
            for _ in range(50):
                try:
                    chosen = mine.step(pending, [9])
                    break
                except KeyboardInterrupt:
                    mine = StepByStep(session, exit, greedy, [greedy.generator(0)])
                    session.rewind(length)
            assert chosen == expected
            pending = [[token.id for token in expected[0]]]
        mine.end()
        assert session.tokens() == reference.tokens()
    assert failed


def test_steps_are_timed_as_text_is_generated(case):
    """Some as one, each begun before the token before it is known: the device's own choice."""
    if case.chain.precision != "fp32":
        pytest.skip("tokens of 16 bits are not those of fp32")
    if 2 not in case.exits:
        pytest.skip("blocks stand behind other exits")
    turns = Turns(case.chain.spec, case.engines, MAX_LENGTH, 2)
    session = turns.session
    started = []
    follow = session.follow
    session.follow = lambda *arguments: started.append(1) or follow(*arguments)
    never = ExitPolicy(exits=(1, 2), measure="top", thresholds=(2.0, 2.0))
    exits = [2, 1, never, "full", 2, 2, 1, never, 2, 3]
    steps = turns.steps(exits)
    for step in steps:
        step()
    assert len(steps) == 2
    assert len(started) == len(exits) - len(steps)
    tokens, reference = session.tokens(), case.reference()
    chosen: list[int] = []
    for at, (token, exit) in enumerate(zip(tokens, exits, strict=True)):
        if at % FOLLOWING:
            assert [token] == chosen
        chosen = reference.choose([token], exit).tokens


def test_logits_in_engines(case, rng, monkeypatch):
    """What is between TensorRT's engines runs in kernels all the same."""
    if not case.engines.has_engines:
        pytest.skip("there are none in bf16")
    session, reference = case.session(2), case.reference(2)
    monkeypatch.setattr(case.engines, "decode_kernels", False)
    for length in (30, 1, 1):
        new = rng.integers(VOCAB_SIZE, size=(2, length)).tolist()
        assert_close(case, session.advance(new), reference.advance(new))


def test_texts_that_take_turns(case):
    """Each has a step begun ahead whose answer waits longer than there are places for answers."""
    sessions, greedy = [case.session() for _ in range(2)], Sampling()
    decoders = [StepByStep(each, "full", greedy, [greedy.generator(0)]) for each in sessions]
    pending, expected = [[[3, 4]], [[5]]], [[3, 4], [5]]
    for _ in range(3):
        for which, decoder in enumerate(decoders):
            for _ in range(2 + 9 * which):
                pending[which] = [[each.id for each in decoder.step(pending[which], [99])[0]]]
                expected[which] += pending[which][0]
    for which, decoder in enumerate(decoders):
        decoder.end()
        assert sessions[which].tokens() == expected[which][:-1]
        reference, tokens = case.reference(), expected[which]
        logits = reference.advance(tokens[:-1], every_position=True)[0]
        prompt = 2 - which
        for at in range(prompt, len(tokens)):
            best = logits[at - 1].max()
            near = max(1e-3, tolerance(case, logits[at - 1]))
            assert best - logits[at - 1][tokens[at]] <= near


def test_numbers_are_read_after_their_stamps(driver, monkeypatch):
    """An answer that comes while the host looks: a number of before beside a stamp of now."""
    from ojfa_export.backends.cuda import mailbox
    from ojfa_export.backends.cuda.device import the_device

    box = mailbox.Mailbox(the_device())
    choices = box.expect(1)
    answer = [number for each in (7, 7, 0.5, 0.25, -2.0) for number in (each, choices.turn)]
    torn = [number for each in (0, 0, 0.0, 0.0, 0.0) for number in (each, choices.turn)]
    looks = iter([[0] * 10, torn, answer])
    plain = mailbox.ANSWER
    looking = SimpleNamespace(size=plain.size, unpack_from=lambda *_: tuple(next(looks)))
    monkeypatch.setattr(mailbox, "ANSWER", looking)
    assert choices.tokens() == choices.likeliest() == [7]
    assert choices.confidence("entropy") == [-2.0]
