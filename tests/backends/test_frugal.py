"""Engines that keep one block or head loaded at a time give what engines that stay loaded give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ojfa_export
from ojfa_export.backends import frugal as frugal_module
from ojfa_export.backends.frugal import FrugalEngines, close_all, frugal
from ojfa_export.runtime.session import Session


def loaded(engines) -> set[str]:
    return set(engines._sessions)


def test_a_block_or_head_is_closed_once_it_has_run(tiny_bundle: Path, rng):
    model, staying = ojfa_export.load(tiny_bundle), ojfa_export.load(tiny_bundle)
    session = Session(model.spec, FrugalEngines(model.engines), 2, 32)
    expected = staying.session(2, 32)
    tokens = rng.integers(0, model.spec.vocab_size, (2, 9)).tolist()
    for exit in (2, "full"):
        np.testing.assert_array_equal(
            session.advance(tokens, exit=model.blocks if exit == "full" else exit),
            expected.advance(tokens, exit=exit),
        )
        assert loaded(model.engines) == {"embed"}
        tokens = rng.integers(0, model.spec.vocab_size, (2, 1)).tolist()
    assert {"final_head", "exit_head", "block_03"} <= loaded(staying.engines)


def test_heads_may_stay_and_all_may_be_closed(tiny_bundle: Path, rng):
    model, staying = ojfa_export.load(tiny_bundle), ojfa_export.load(tiny_bundle)
    engines = FrugalEngines(model.engines, keep_heads=True)
    session, expected = Session(model.spec, engines, 1, 32), staying.session(1, 32)
    tokens = rng.integers(0, model.spec.vocab_size, (1, 5)).tolist()
    np.testing.assert_array_equal(session.advance(tokens, 2), expected.advance(tokens, exit=2))
    assert loaded(model.engines) == {"embed", "exit_head"}
    close_all(staying.engines, staying.spec)
    assert loaded(staying.engines) == {"embed"}
    # What was closed is opened again when it runs.
    np.testing.assert_array_equal(
        staying.session(1, 32).advance(tokens), model.session(1, 32).advance(tokens)
    )


@pytest.mark.parametrize("large", [True, False])
def test_blocks_and_head_decide_what_is_large(tiny_bundle: Path, monkeypatch, large):
    model = ojfa_export.load(tiny_bundle)
    spec = model.spec
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    mlp = spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
    weights = spec.blocks * (attention + mlp) + spec.hidden_size * spec.vocab_size
    monkeypatch.setattr(frugal_module, "LARGE_BYTES", 4 * weights - large)
    assert isinstance(frugal(model.engines, spec), FrugalEngines) == large
