"""Speculation with a draft layer is lossless, whatever the layer says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from drafts import GoodDrafts, draft_for, open_draft
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st
from test_session import NAMES, examples, poison
from test_speculation import first_difference, joint, p_value, run
from tiny_models import VOCAB_SIZE

import ojfa_export
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator

MAX_LENGTH = 40  # beyond LongRoPE's switch length (32) and the sliding window (8)
NEW = 10


@pytest.fixture(scope="module", params=NAMES)
def parts(request, chain_of, tmp_path_factory):
    """A chain, and the opened draft layer of one."""
    chain = chain_of(request.param)
    draft = draft_for(chain.spec, seed=6, own_head="phi3" in request.param)
    return chain, open_draft(chain, draft, tmp_path_factory.mktemp("draft"))


def full_depth(chain, prompt: list[int]) -> list[int]:
    """Greedy tokens of full depth."""
    session = chain.session(1, MAX_LENGTH)
    tokens = [int(session.advance(prompt)[0].argmax())]
    while len(tokens) < NEW and session.lengths[0] < MAX_LENGTH:
        tokens.append(int(session.advance(tokens[-1:])[0].argmax()))
    return tokens


@pytest.mark.parametrize("good", [False, True], ids=["random layer", "good drafts"])
@settings(examples, max_examples=25)  # of eight pairs each
@forall(
    prompts=st.lists(
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=36), min_size=1, max_size=3
    ),
    draft=st.none() | st.integers(1, 6),
)
def test_greedy_tokens_are_those_of_full_depth(parts, good, prompts, draft):
    chain, layer = parts
    wanted = [full_depth(chain, prompt) for prompt in prompts]
    texts = [prompt + tokens for prompt, tokens in zip(prompts, wanted, strict=True)]
    drafts = GoodDrafts(layer, texts) if good else layer
    session = Session(chain.spec, chain.engines, len(prompts), MAX_LENGTH, drafts=drafts)
    generators = [np.random.default_rng(0)] * len(prompts)
    speculation = Speculation(0, draft, draft_cost=0.1)
    speculator = Speculator(session, speculation, Sampling(), generators)
    tokens: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    while any(pending):
        poison(session)
        chosen = speculator.step(pending, [NEW - len(ids) for ids in tokens])
        for row, given in enumerate(chosen):
            assert bool(given) == bool(pending[row])
            tokens[row] += [token.id for token in given]
            pending[row] = tokens[row][-1:]
            assert session.tokens(row) == (prompts[row] + tokens[row])[:-1]
            assert (session.watermarks[:, row] == session.lengths[row]).all()
            if len(tokens[row]) >= NEW or session.lengths[row] == MAX_LENGTH:
                pending[row] = []
    for prompt, ids, reference in zip(prompts, tokens, wanted, strict=True):
        assert len(ids) == len(reference)
        first_difference(chain, prompt, ids)
    stats = session.stats
    assert stats.accepted + stats.rounds == sum(map(len, tokens))
    if good and draft and max(map(len, prompts)) <= 20:
        assert stats.accepted


@pytest.mark.parametrize("draft", [1, 2, None])
@pytest.mark.parametrize(
    "chosen", [{"temperature": 1.3, "top_k": 4}, {"temperature": 8.0, "top_k": 5, "top_p": 0.9}]
)
def test_sampled_tokens_have_the_full_models_distribution(tiny_bundle, draft, chosen):
    """The first three tokens: of the prompt's round, then drafts, replacements and bonuses."""
    model = ojfa_export.load(tiny_bundle)
    prompt, sampling = [5, 6, 7], Sampling(**chosen)
    expected = joint(model, prompt, 3, sampling)
    likeliest = sorted(expected, key=expected.__getitem__)[-12:]
    counts: Counter = Counter()
    accepted = rejected = 0
    for seed in range(40):
        drafts = GoodDrafts(StandIn(model.spec), [[*prompt, *path] for path in likeliest])
        session = Session(model.spec, model.engines, 16, 8, drafts=drafts)
        for completion in run(
            model,
            session,
            [prompt] * 16,
            max_new_tokens=5,
            sampling=Sampling(**chosen, seed=seed),
            speculation=Speculation(0, draft, draft_cost=0.05),
        ):
            counts[tuple(completion.token_ids[:3])] += 1
        accepted += session.stats.accepted
        rejected += session.stats.drafted - session.stats.accepted
    assert min(accepted, rejected) > 100
    assert p_value(counts, expected, np.random.default_rng(0)) > 0.01


class StandIn:
    """In place of a draft layer: numbers that name a row, and a flat distribution."""

    def __init__(self, spec):
        self.depths, self._spec, self._count = (1, 2, spec.blocks), spec, 0
        self.token_bytes, self.takes_whole = 0, False

    def executor(self, slots, capacity):
        return self

    def keep(self, index, chunks, hidden):
        assert len(hidden) == sum(chunk.length for chunk in chunks)

    def begin(self, tokens, chunks):
        self._count += len(chunks)
        first = np.arange(self._count - len(chunks), self._count, dtype=np.float32)
        return np.repeat(first[:, None], self._spec.hidden_size, axis=1)

    def go_on(self, hidden, tokens, chunks):
        return self.begin(tokens, chunks)

    def release(self, slot):
        pass

    def logits(self, hidden, blocks_run):
        return np.zeros((len(hidden), self._spec.vocab_size), np.float32)
