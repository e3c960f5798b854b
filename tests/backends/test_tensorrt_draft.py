"""Draft layers of the TensorRT backend on a stand-in for the GPU, against the CPU runtime's."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from chain import Chain, build_chain
from drafts import GoodChains, draft_for, draft_layer, open_draft
from elements import split_precision
from stand_in.late_driver import StandInDriver
from tiny_models import VOCAB_SIZE, make_checkpoint
from tolerances import (
    DRAFT_BF16_RELATIVE,
    DRAFT_FP16_RELATIVE,
    DRAFT_FP32_RELATIVE,
    LOGITS_BF16_RELATIVE,
    LOGITS_FP16_RELATIVE,
)

from ojfa_export.bundle.names import DRAFT_GRAPHS, graph_names
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import PROBE_ROUNDS, Speculation
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator

MAX_LENGTH = 70  # more than a page of the cache
RELATIVE = {
    "fp32": DRAFT_FP32_RELATIVE,
    "fp16": DRAFT_FP16_RELATIVE,
    "bf16": DRAFT_BF16_RELATIVE,
}
NEAR = {
    "fp32": LOGITS_FP16_RELATIVE,
    "fp16": LOGITS_FP16_RELATIVE,
    "bf16": LOGITS_BF16_RELATIVE,
}
CASES = ["qwen3", "gpt2", "llama-gqa-fp16", "llama-gqa-bf16"]


@dataclass
class Case:
    """A model and a draft layer, opened by both backends."""

    chain: Chain
    driver: StandInDriver
    engines: Any
    drafts: Any
    cpu_drafts: Any

    def session(self, batch: int = 1, drafts: Any = None) -> Session:
        return Session(
            self.chain.spec, self.engines, batch, MAX_LENGTH, drafts=drafts or self.drafts
        )

    def reference(self, batch: int = 1) -> Session:
        return Session(
            self.chain.spec, self.chain.engines, batch, MAX_LENGTH, drafts=self.cpu_drafts
        )


@pytest.fixture(scope="module", params=CASES)
def case(request, driver, tmp_path_factory):
    from ojfa_export.backends.tensorrt.backend import BACKEND

    directory = tmp_path_factory.mktemp(request.param)
    variant, precision = split_precision(request.param)
    chain = build_chain(
        make_checkpoint(variant, directory / "checkpoint", seed=5),
        directory,
        precision=precision,
        max_length=MAX_LENGTH,
    )
    draft = draft_for(chain.spec, seed=5, own_head=request.param != "gpt2")
    cpu_drafts = open_draft(chain, draft, directory / "draft")
    plans = {}
    (directory / "built").mkdir()
    for name in (*graph_names(chain.spec.blocks), *DRAFT_GRAPHS):
        plans[name] = directory / "built" / f"{name}.json"
        spec = draft.spec_within(chain.spec) if name in DRAFT_GRAPHS else chain.spec
        BACKEND.build_engine(spec, chain.graphs / f"{name}.onnx", plans[name])
    layer = draft_layer(chain, draft, {name: plans.pop(name) for name in DRAFT_GRAPHS})
    rotary = chain.checkpoint.family.rotary(chain.checkpoint.config)
    tables = rotary.tables(chain.max_length) if rotary else None
    engines = BACKEND.open_engines(chain.spec, chain.graphs, plans, tables)
    return Case(chain, driver, engines, BACKEND.open_draft(engines, layer), cpu_drafts)


def assert_close(case: Case, found: np.ndarray, expected: np.ndarray) -> None:
    known = np.isfinite(expected)
    assert (np.isfinite(found) == known).all()
    relative = RELATIVE[case.chain.precision]
    largest = np.abs(expected[known]).max()
    assert np.abs(found[known] - expected[known]).max() < relative * largest


@pytest.mark.parametrize("batch", [1, 3])
def test_chains_step_by_step(case, rng, batch):
    sessions = case.session(batch), case.reference(batch)
    for each in sessions:
        each.advance([list(range(1, 12 + row)) for row in range(batch)])
    for accepted in (0, 2, 3, 1):
        new = rng.integers(VOCAB_SIZE, size=(4, batch)).tolist()
        before = sessions[0].lengths
        for step in range(3):
            found, expected = (
                each.propose_logits([[token] for token in new[step]]) for each in sessions
            )
            assert_close(case, found, expected)
        for each in sessions:
            each.complete([[token] for token in new[3]], [4] * batch)
            for row in range(batch):
                each.rewind(before[row] + 1 + accepted, row)


def greedy(session: Session, prompts, new: int, draft: int | None, cost: float = 0.1):
    """Tokens of each prompt, by rounds of drafts."""
    generators = [np.random.default_rng(0)] * len(prompts)
    speculation = Speculation(0, draft, draft_cost=cost)
    speculator = Speculator(session, speculation, Sampling(), generators)
    tokens: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    while any(pending):
        chosen = speculator.step(pending, [new - len(ids) for ids in tokens])
        for row, given in enumerate(chosen):
            tokens[row] += [token.id for token in given]
            known = (prompts[row] + tokens[row])[:-1]
            assert session.tokens(row)[: len(known)] == known  # a step may have been begun ahead
            pending[row] = tokens[row][-1:] if len(tokens[row]) < new and given else []
    speculator.end()
    return tokens


@pytest.mark.parametrize("draft", [1, 3, 8, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_full_depth(case, rng, batch, draft):
    if case.chain.precision != "fp32":
        pytest.skip("tokens of 16 bits are not those of fp32")
    prompts = [rng.integers(VOCAB_SIZE, size=5 + 9 * row).tolist() for row in range(batch)]
    session, reference = case.session(batch), case.reference(batch)
    assert session.proposes_at_once
    assert not reference.proposes_at_once
    found = greedy(session, prompts, 30, draft)
    assert found == greedy(reference, prompts, 30, draft)
    for row, prompt in enumerate(prompts):
        plain = Session(case.chain.spec, case.chain.engines, 1, MAX_LENGTH)
        token = int(plain.advance(prompt)[0].argmax())
        for given in found[row]:
            assert given == token
            token = int(plain.advance([token])[0].argmax())
    if batch == 1:
        assert session.stats.drafted == reference.stats.drafted
        assert session.stats.accepted == reference.stats.accepted


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_begun_ahead_where_drafting_does_not_pay(case, rng, batch, monkeypatch):
    """All but the first and those that try whether it pays again, and their neighbours."""
    prompts = [rng.integers(VOCAB_SIZE, size=6).tolist() for _ in range(batch)]
    session, followed = case.session(batch), []
    follow = session.follow
    monkeypatch.setattr(session, "follow", lambda *a: followed.append(1) or follow(*a))
    new = 3 * PROBE_ROUNDS + 4
    found = greedy(session, prompts, new, None, cost=9.0)
    assert [len(ids) for ids in found] == [new] * batch
    assert 1 <= session.stats.rounds <= 2 * batch
    assert len(followed) >= new - 2 * 3 - 1
    assert (session.watermarks == session.lengths).all()
    if case.chain.precision == "fp32":
        plain = Session(case.chain.spec, case.chain.engines, batch, MAX_LENGTH)
        pending = prompts
        for at in range(new):
            tokens = plain.choose(pending).tokens
            assert tokens == [ids[at] for ids in found]
            pending = [[token] for token in tokens]


def test_rounds_are_begun_before_they_are_asked_for(case, rng, monkeypatch):
    """But for the last, which nobody wants, and the first two."""
    session, begun, waiting = case.session(), [], []
    begin, finish = session.begin_round, session.finish_round
    monkeypatch.setattr(session, "begin_round", lambda *a: begun.append(len(waiting)) or begin(*a))
    monkeypatch.setattr(session, "finish_round", lambda *a: waiting.append(1) or finish(*a))
    prompt = rng.integers(VOCAB_SIZE, size=6).tolist()
    asked = Speculator(session, Speculation(0, 3), Sampling(), [np.random.default_rng(0)])
    pending, left, steps = [prompt], 30, 0
    while left:
        [chosen] = asked.step(pending, [left])
        pending, left, steps = [[chosen[-1].id]], left - min(left, len(chosen)), steps + 1
        assert len(begun) == len(waiting) + (steps > 1 and left > 1)
    assert steps - len(waiting) in (1, 2)  # without a draft: the prompt, and one last token
    assert begun == list(range(len(waiting)))
    asked.end()
    assert (session.watermarks == session.lengths).all()


def test_a_round_is_two_launches(case, rng):
    """Once it has been recorded, whatever it drafts and wherever the sequence is."""
    session = case.session()
    session.advance(rng.integers(VOCAB_SIZE, size=6).tolist())
    session.propose_and_complete([[1]], [3])
    for round in range(6):
        session.rewind(session.lengths[0] - 1)
        case.driver.launched.clear()
        drafts, best = session.propose_and_complete([[2 + round]], [3])
        assert [len(drafts[0]), len(best[0])] == [3, 4]
        if round > 1:
            assert case.driver.launched == ["graph", "graph"]


@pytest.mark.parametrize("draft", [2, 5, None])
@pytest.mark.parametrize("batch", [1, 3])
def test_good_drafts_are_accepted(case, rng, batch, draft):
    """They are checked where the device has them; in 16 bits a near tie may go either way."""
    prompts = [rng.integers(VOCAB_SIZE, size=4 + 7 * row).tolist() for row in range(batch)]
    wanted = []
    for prompt in prompts:
        plain = Session(case.chain.spec, case.engines, 1, MAX_LENGTH)
        tokens, pending = [], prompt
        for _ in range(40):
            pending = plain.choose([pending]).tokens
            tokens += pending
        wanted.append(tokens)
    texts = [prompt + tokens for prompt, tokens in zip(prompts, wanted, strict=True)]
    session = case.session(batch, GoodChains(case.drafts, texts))
    found = greedy(session, prompts, 40, draft)
    if case.chain.precision == "fp32":
        assert [each[:40] for each in found] == wanted
    for prompt, given in zip(prompts, found, strict=True):
        plain = Session(case.chain.spec, case.engines, 1, MAX_LENGTH)
        [logits] = plain.advance([[*prompt, *given[:40]]], every_position=True)
        for row, token in zip(logits[len(prompt) - 1 :], given[:40], strict=False):
            assert row.max() - row[token] <= NEAR[case.chain.precision] * np.abs(row).max()
    # Drafts are of the text that is wanted, so they are good as long as it is given.
    pairs = zip(found, wanted, strict=True)
    alike = sum(sum(accumulate(map(operator.eq, *pair), operator.and_)) for pair in pairs)
    assert session.stats.accepted >= alike // 3
