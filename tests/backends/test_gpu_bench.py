"""`bench.gpu.drafts` runs, on the stand-in for the GPU; its figures mean nothing there."""

from __future__ import annotations

import importlib
import json
import sys

import pytest


@pytest.fixture(scope="module")
def drafts(driver):
    """The benchmark, imported over the stand-in."""
    names = [name for name in sys.modules if name.startswith("bench.gpu")]
    before = {name: sys.modules.pop(name) for name in names}
    module = importlib.import_module("bench.gpu.drafts")
    yield module
    for name in [name for name in sys.modules if name.startswith("bench.gpu")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("head", [0, 40])
def test_shapes_are_measured(drafts, tmp_path, monkeypatch, head):
    from bench.gpu import shapes

    spec = shapes._spec("llama", 4, 32, 4, 48, 96)
    tied = spec.model_copy(update={"kv_heads": 2, "tied_head": True})
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", tied)
    monkeypatch.setattr(shapes, "POOL", 1 << 12)
    monkeypatch.setattr(drafts, "WARMUP", 3)
    out = tmp_path / "drafts.json"
    arguments = ["--out", str(out), "--shapes", "smollm2-135m", "--past", "20", "--rounds", "4"]
    drafts.main([*arguments, "--head", str(head), "--chain", "0.9", "0.5"])
    [shape] = json.loads(out.read_text())["shapes"]
    assert len(shape["parts_us"]) == 2 * drafts.MOST_DRAFTS + 1
    assert [row["drafts"] for row in shape["rounds"]] == list(range(drafts.MOST_DRAFTS + 1))
    assert set(shape["costs"]) == {"draft_cost", "check_cost", "round_cost"}
    counts = [*range(1, drafts.MOST_DRAFTS + 1), "adapted"]
    assert [text["drafts"] for text in shape["texts"]] == counts
    assert all(text["tokens_per_check"] >= 1 for text in shape["texts"])
