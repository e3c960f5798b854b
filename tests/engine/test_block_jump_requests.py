"""Requests that leave at exits with blocks behind them, against each alone."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chain import random_blocks
from engine.random_requests import TIMEOUT, alone, check_each_gives_what_it_gives_alone, requests
from engine.test_engine import examples
from engine.watched_engine import WatchedEngine
from hypothesis import given
from hypothesis import strategies as st
from vectors.cases import DIRECTORY

import ojfa_export
from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.onnxruntime.build import build_engine
from ojfa_export.backends.onnxruntime.exit_blocks import OnnxRuntimeExitBlocks
from ojfa_export.bundle.names import exit_names
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.engine.budget import PAGE_TOKENS, CacheSize, page_bytes
from ojfa_export.errors import UsageError
from ojfa_export.graphs.export import Exporter
from ojfa_export.runtime.model import Model

EXITS = (1, 2, 3)


@pytest.fixture(scope="module", params=["llama", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A stored bundle, random blocks behind its exits; Phi-3's rotation switches in the cache."""
    directory = tmp_path_factory.mktemp(request.param)
    bundle = shutil.copytree(DIRECTORY / f"{request.param}.ojfa", directory / "bundle.ojfa")
    model = ojfa_export.load(bundle)
    graphs, spec, tables = model.bundle.graphs, model.spec, model.manifest.rotary
    shortcut = random_blocks(spec, EXITS, seed=3, each=request.param == "phi3")
    checkpoint: Any = SimpleNamespace(spec=spec)
    length = model.manifest.cache.max_length
    Exporter(checkpoint, graphs, "fp32", length).shortcut(shortcut)
    files = {name: directory / f"{name}.onnx" for name in exit_names(shortcut.blocks)}
    for name, file in files.items():
        build_engine(spec, graphs / f"{name}.onnx", file)
    assert tables is not None
    rotary = model.bundle.tensor(tables.cos), model.bundle.tensor(tables.sin)
    jump = BlockJump(EXITS, shortcut.blocks, spec, graphs, files, rotary)
    model.engines.exit_blocks = OnnxRuntimeExitBlocks(jump)
    return model


@examples
@given(requests=requests, slots=st.integers(1, 4), pages=st.sampled_from([6, 100]))
def test_requests_give_the_tokens_of_each_alone(
    model: Model, requests: list[dict[str, Any]], slots: int, pages: int
) -> None:
    check_each_gives_what_it_gives_alone(model, model, requests, slots, pages)


def test_prefixes_are_shared_whatever_their_first_owner_asked(model: Model) -> None:
    prefix = np.random.default_rng(0).integers(model.spec.vocab_size, size=20).tolist()
    policy = ExitPolicy(exits=(1, 3), measure="top", thresholds=(0.02, 0.02))
    ways: list[dict[str, Any]] = [
        {"exit": "full"}, {"exit": 2}, {"exit": policy}, {"exit": 2},
        {"exit": "full", "speculate": Speculation(3, 2)}, {"exit": 3},
    ]  # fmt: skip
    with WatchedEngine(model, max_sequences=2) as engine:
        for _ in range(2):  # one after the other in place, then beside each other
            running = []
            for number, way in enumerate(ways):
                options = {"max_new_tokens": 6, "ignore_eos": True, **way}
                prompt = [*prefix, number]
                running.append((prompt, options, engine.submit(prompt, **options)))
            for prompt, options, each in running:
                result = each.result(TIMEOUT)
                assert result.token_ids == alone(model, prompt, options).token_ids
                assert result.exit_blocks == alone(model, prompt, options).exit_blocks
        assert engine.stats().cached_tokens >= 20


def test_a_budget_counts_the_blocks_of_exits_that_are_asked(model: Model) -> None:
    spec, engines = model.spec, model.engines
    assert engines.exit_blocks is not None
    token_bytes = 2 * spec.kv_heads * spec.head_dim * 4
    assert engines.exit_blocks.token_bytes == token_bytes
    limit = 8 * page_bytes(spec)
    size = CacheSize.of(spec, engines, 2, 1000, limit)
    assert size.pages == 8
    for exits in range(4):
        most = size.tokens(exits)
        assert most == 8 * PAGE_TOKENS * spec.blocks // (spec.blocks + exits)
        assert most * (spec.blocks + exits) * token_bytes <= limit
        assert size.fits(most, exits)
        assert not size.fits(most + PAGE_TOKENS, exits)
    unlimited = CacheSize.of(spec, engines, 2, 64, None)
    assert unlimited.fits(2 * 64, len(EXITS))
    with WatchedEngine(model, max_sequences=2, kv_cache_bytes=2 * page_bytes(spec)) as engine:
        prompt, policy = [1] * 45, ExitPolicy(exits=EXITS, measure="top", thresholds=(1, 1, 1))
        with pytest.raises(UsageError, match="the prompt has 45 tokens, the KV cache holds 36"):
            engine.submit(prompt, exit=policy)
        assert len(engine.submit(prompt, exit=2, max_new_tokens=2).result(TIMEOUT).token_ids) == 2


def test_requests_sent_back_for_want_of_pages_come_to_the_same(model: Model) -> None:
    options = {"max_new_tokens": 24, "ignore_eos": True, "exit": 2}
    prompts = [[first] * 20 for first in (1, 30, 60)]
    budget = 5 * page_bytes(model.spec)
    with WatchedEngine(model, max_sequences=3, kv_cache_bytes=budget) as engine:
        results = [each.result(TIMEOUT) for each in [engine.submit(p, **options) for p in prompts]]
        assert engine.stats().preemptions > 0
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == alone(model, prompt, options).token_ids
