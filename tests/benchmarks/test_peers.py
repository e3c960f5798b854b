"""Contestants of the race decode the same tokens: what is timed is the same work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_checkpoint
from tolerances import LOGITS_FP32

from bench.cpu.compiled import Compiled, compile_checkpoint
from bench.cpu.contestants import Chain, Monolithic, Transformers
from bench.cpu.monolithic import MonolithicModel
from bench.cpu.race import race
from ojfa_export.runtime.session import Session

CAPACITY = 64


@pytest.fixture(scope="module", params=["gpt2", "llama-gqa"])
def made(request, tmp_path_factory) -> tuple[Path, Compiled]:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(request.param, folder / "checkpoint", seed=1)
    return folder, compile_checkpoint(folder / "checkpoint", folder, CAPACITY)


def test_the_monolithic_graph_computes_what_the_chain_does(made, rng):
    folder, compiled = made
    model = MonolithicModel(compiled, folder / "monolithic.onnx", CAPACITY)
    session = Session(compiled.spec, compiled.open(), 1, CAPACITY)
    ids = rng.integers(0, compiled.spec.vocab_size, 20).tolist()
    pairs = [(model.prefill(ids[:10]).copy(), session.advance(ids[:10]))]
    for position in range(10, 20):
        token = ids[position]
        pairs.append((model.decode(token, position).copy(), session.advance([token])))
    worst = max(np.abs(ours - theirs).max() for ours, theirs in pairs)
    assert worst < LOGITS_FP32


def test_contestants_pick_the_same_tokens_again_after_rewinding(made, rng):
    folder, compiled = made
    session = Session(compiled.spec, compiled.open(), 1, CAPACITY)
    contestants = [
        Chain(session, compiled.spec.blocks),
        Monolithic(compiled, folder, CAPACITY),
        Transformers(folder / "checkpoint", 1),
    ]
    prompt = rng.integers(0, compiled.spec.vocab_size, 12).tolist()
    firsts = []
    for contestant in contestants:
        contestant.start(prompt)
        firsts.append([contestant.step()])
        contestant.rewind()
    assert firsts[0] == firsts[1] == firsts[2]
    turns = list(race(contestants, prompt, rounds=2, burst=3, warmup=1))
    assert [name for name, _ in turns].count("monolithic") == 2
    assert all(len(seconds) == 3 for _, seconds in turns)
    assert session.lengths == [12]
