"""Requests that draft with a draft layer, among others, against each alone."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from drafts import GoodDrafts, draft_for, open_beside
from engine.random_requests import (
    TIMEOUT,
    alone,
    check_each_gives_what_it_gives_alone,
    layer_requests,
)
from engine.test_engine import examples
from engine.watched_engine import WatchedEngine
from hypothesis import given
from hypothesis import strategies as st
from vectors.cases import DIRECTORY

import ojfa_export
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.engine.budget import PAGE_TOKENS, CacheSize, page_bytes
from ojfa_export.errors import UsageError
from ojfa_export.runtime.model import Model


@pytest.fixture(scope="module", params=["llama", "phi3"])
def model(request, tmp_path_factory) -> Model:
    """Phi-3 with LongRoPE, whose rotation switches within the cache; both with a random layer."""
    directory = tmp_path_factory.mktemp(request.param)
    bundle = shutil.copytree(DIRECTORY / f"{request.param}.ojfa", directory / "bundle.ojfa")
    model = ojfa_export.load(bundle)
    length, draft = model.manifest.cache.max_length + 1, draft_for(model.spec, seed=8)
    model.drafts = open_beside(model.bundle.graphs, model.spec, length, draft, directory / "layer")
    return model


@examples
@given(requests=layer_requests, slots=st.integers(1, 4), pages=st.sampled_from([3, 100]))
def test_requests_give_the_tokens_of_each_alone(model, requests, slots, pages):
    """Sampled drafts included: a request's random numbers don't depend on its neighbours."""
    check_each_gives_what_it_gives_alone(model, model, requests, slots, pages)


def test_good_drafts_are_accepted_and_a_shared_prefix_is_known_to_the_layer(model, monkeypatch):
    prefix = np.random.default_rng(0).integers(model.spec.vocab_size, size=18).tolist()
    prompts = [[*prefix, 5], [*prefix, 6, 7], prefix[:4]]
    options = {"max_new_tokens": 12, "ignore_eos": True}
    wanted = [alone(model, prompt, {"exit": "full", **options}) for prompt in prompts]
    texts = [prompt + each.token_ids for prompt, each in zip(prompts, wanted, strict=True)]
    monkeypatch.setattr(model, "drafts", GoodDrafts(model.drafts, texts))
    with WatchedEngine(model, max_sequences=2) as engine:
        plain = engine.submit(prompts[0], **options).result(TIMEOUT)
        assert plain.token_ids == wanted[0].token_ids
        cached = []
        for _ in range(2):
            requests = [
                engine.submit(ids, speculate=Speculation(0, 4), **options) for ids in prompts
            ]
            for request, each in zip(requests, wanted, strict=True):
                result = request.result(TIMEOUT)
                assert result.token_ids == each.token_ids
                cached.append(result.usage.cached_tokens)
        # Of the plain request's tokens no states were kept.
        assert cached[0] == 0
        assert max(cached[1:]) >= 18
        assert engine.stats().drafted > 20


@pytest.mark.parametrize("takes_whole", [False, True])
def test_a_budget_counts_what_the_layer_keeps(model, monkeypatch, takes_whole):
    """Of each token as it is written, or of all tokens that there may be at once."""
    spec, drafts, length = model.spec, model.drafts, 3 * PAGE_TOKENS
    layer = draft_for(spec, seed=8).spec_within(spec)
    states = 4 * len(drafts.depths) * spec.hidden_size
    assert drafts.token_bytes == 2 * layer.kv_heads * layer.head_dim * 4 + states
    monkeypatch.setattr(drafts, "takes_whole", takes_whole)
    beside = 2 * length * drafts.token_bytes if takes_whole else 0
    size = page_bytes(spec) + (0 if takes_whole else PAGE_TOKENS * drafts.token_bytes)

    def pages(limit):
        return CacheSize.of(spec, model.engines, 2, length, limit, drafts).pages

    assert [pages(beside + 5 * size + more) for more in (-1, 0)] == [4, 5]
    assert pages(beside + 100 * size) == 6
    with pytest.raises(UsageError) as raised:
        pages(beside + size - 1)
    assert f"a page takes {size} bytes" in raised.value.hint
    assert ("draft layer" in raised.value.hint) == takes_whole


def test_requests_sent_back_for_want_of_pages_draft_again(model):
    budget = 4 * (page_bytes(model.spec) + PAGE_TOKENS * model.drafts.token_bytes)
    options = {"max_new_tokens": 24, "ignore_eos": True, "speculate": Speculation(0, 3)}
    prompts = [[first] * 20 for first in (1, 30, 60)]
    with WatchedEngine(model, max_sequences=3, kv_cache_bytes=budget) as engine:
        running = [engine.submit(prompt, **options) for prompt in prompts]
        results = [each.result(TIMEOUT) for each in running]
        assert engine.stats().preemptions > 0
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == alone(model, prompt, options).token_ids
