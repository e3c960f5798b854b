"""Weights of four bits that are fitted to text while the graphs are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_checkpoint

from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.compiler.fitted_weights import WINDOW_TOKENS, WINDOWS, WeightFitter, fitting_text
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.quantised import Quantiser
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.verify.exact import HIDDEN, ExactModel

FORM = WeightFormat(storage="int4", group_size=16, zero_points=True, offsets=True)
LENGTH = 64


def exporter_of(checkpoint: Checkpoint, directory: Path, token_ids=None) -> Exporter:
    directory.mkdir(exist_ok=True)
    quantiser = Quantiser(FORM, quantise)
    exporter = Exporter(checkpoint, directory, "fp32", LENGTH, quantiser)
    if token_ids is not None:
        rotary = checkpoint.family.rotary(checkpoint.config)
        exact = ExactModel(checkpoint.spec, directory, rotary and rotary.tables(LENGTH))
        exporter.fitter = WeightFitter(exact, token_ids, quantiser)
    return exporter


def export(exporter: Exporter, blocks: int) -> None:
    exporter.embed()
    for index in range(blocks):
        exporter.block(index)


@pytest.fixture(params=["llama-gqa", "gpt2", "qwen3", "gemma2"])
def checkpoint(request, tmp_path) -> Checkpoint:
    return Checkpoint(make_checkpoint(request.param, tmp_path / "checkpoint", seed=3))


def test_an_interrupted_export_goes_on_as_if_it_had_not_been(checkpoint, tmp_path, rng):
    spec = checkpoint.spec
    token_ids = rng.integers(spec.vocab_size, size=(4, 40)).astype(np.int32)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = exporter_of(checkpoint, whole, token_ids)
    export(straight, spec.blocks)
    straight.final_head()
    export(exporter_of(checkpoint, parts, token_ids), 2)
    again = exporter_of(checkpoint, parts, token_ids)
    export(again, spec.blocks)
    again.final_head()
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in parts.iterdir())
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_model_of_fitted_weights_is_nearer_to_the_original(checkpoint, tmp_path, rng):
    """On other text of the same kind, after all blocks."""
    spec = checkpoint.spec
    # Text in which tokens go together: what may follow one is one of few.
    following = rng.integers(spec.vocab_size, size=(spec.vocab_size, 3))
    rows = rng.integers(spec.vocab_size, size=(24, 1))
    for _ in range(39):
        rows = np.concatenate([rows, following[rows[:, -1:], rng.integers(3, size=(24, 1))]], 1)
    fitted_on, others = np.split(rows.astype(np.int32), [18])
    wide = tmp_path / "wide"
    wide.mkdir()
    export(Exporter(checkpoint, wide, "fp32", LENGTH), spec.blocks)
    export(exporter_of(checkpoint, tmp_path / "nearest"), spec.blocks)
    export(exporter_of(checkpoint, tmp_path / "fitted", fitted_on), spec.blocks)
    found = {}
    for name in ("wide", "nearest", "fitted"):
        rotary = checkpoint.family.rotary(checkpoint.config)
        exact = ExactModel(spec, tmp_path / name, rotary and rotary.tables(LENGTH))
        hidden = exact.embed(others)
        for index in range(spec.blocks):
            hidden = exact.block(index, hidden)[HIDDEN]
        found[name] = hidden
    lost = {name: np.linalg.norm(found[name] - found["wide"]) for name in ("nearest", "fitted")}
    assert lost["fitted"] < lost["nearest"]


def test_text_from_all_over_the_calibration_data():
    windows = np.arange(100)[:, None] * np.ones((1, 2 * WINDOW_TOKENS), np.int32)
    text = fitting_text(windows.astype(np.int32))
    assert text.shape == (WINDOWS, WINDOW_TOKENS)
    assert (text[0, 0], text[-1, 0]) == (0, 99)
    assert len(fitting_text(windows[:3].astype(np.int32))) == 3
