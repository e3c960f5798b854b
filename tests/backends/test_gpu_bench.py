"""Benchmarks of the GPU run, on the stand-in for one; their figures mean nothing there."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import uvicorn
from tokenizers import Tokenizer

from ojfa_export.serving import server as serving_server
from ojfa_export.serving.app import create_app
from ojfa_export.serving.catalogue import Catalogue


@pytest.fixture
def imported(driver) -> Iterator[Callable[[str], ModuleType]]:
    """Benchmarks, imported over the stand-in."""
    before = {name: sys.modules.pop(name) for name in _of_benchmarks()}
    yield importlib.import_module
    for name in _of_benchmarks():
        del sys.modules[name]
    sys.modules.update(before)


def _of_benchmarks() -> list[str]:
    return [name for name in sys.modules if name.startswith("bench.gpu")]


@pytest.mark.parametrize("head", [0, 40])
def test_drafts_of_shapes(imported, tmp_path, monkeypatch, head):
    drafts, shapes = imported("bench.gpu.drafts"), imported("bench.gpu.shapes")
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


def test_exits_of_shapes(imported, tmp_path, monkeypatch):
    """Both jumps, with the whole head and a check head, leaving and going on."""
    exits, shapes = imported("bench.gpu.exits"), imported("bench.gpu.shapes")
    running = imported("bench.gpu.run")
    monkeypatch.setattr(running, "copy_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(running, "nvidia_smi", dict)
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", shapes._spec("llama", 4, 32, 4, 48, 96))
    monkeypatch.setattr(shapes, "POOL", 1 << 12)
    out = tmp_path / "exits.json"
    arguments = ["--out", str(out), "--shapes", "smollm2-135m", "--past", "9", "--tokens", "4"]
    exits.main([*arguments, "--batch", "1"])
    [shape] = json.loads(out.read_text())["shapes"]
    found = [(row["jump"], row["head"], row["exit"]) for row in shape["exits"]]
    assert found == [(k, head, e) for k in ("mlp", "block") for head in (96, 48) for e in (1, 2)]


@pytest.mark.parametrize("storage", [pytest.param("int4", marks=pytest.mark.slow), "fp8"])
def test_quantised_weights_of_shapes(imported, tmp_path, monkeypatch, storage):
    tensorrt, shapes = imported("bench.gpu.tensorrt"), imported("bench.gpu.shapes")
    clock, run = imported("bench.gpu.clock"), imported("bench.gpu.run")
    monkeypatch.setitem(shapes.SHAPES, "llama2-7b", shapes._spec("llama", 4, 64, 4, 96, 96))
    monkeypatch.setattr(shapes, "POOL", 1 << 12)
    monkeypatch.setattr(clock, "REPLAYS", 1)
    monkeypatch.setattr(run, "copy_bandwidth", lambda _: 1.0)
    monkeypatch.setattr(run, "nvidia_smi", dict)
    for name, value in {"PREFILL": 8, "CHECKED_PAST": 8, "parts": lambda *_: {}}.items():
        monkeypatch.setattr(tensorrt, name, value)
    out = tmp_path / "weights.json"
    few = ["--past", "8", "--batch", "1", "3", "--exits", "1", "4", "--tokens", "2"]
    tensorrt.main(["--out", str(out), "--weights", storage, "--group-size", "32", *few])
    result = json.loads(out.read_text())
    assert result["settings"]["weights"] == storage
    decoded = [(row["batch"], row["blocks"]) for row in result["shapes"][0]["decode"]]
    assert decoded == [(1, 1), (1, 4), (3, 1), (3, 4)]


def test_serving(imported, tmp_path, monkeypatch):
    serving, shapes = imported("bench.gpu.serving"), imported("bench.gpu.shapes")
    monkeypatch.setitem(shapes.SHAPES, "llama2-7b", shapes._spec("llama", 4, 32, 4, 48, 96))
    monkeypatch.setattr(shapes, "POOL", 1 << 12)
    small = {"PAST": 20, "LENGTH": 256, "SEQUENCES": 4}
    for name, value in small.items():
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving.poisson, "__defaults__", (7, (4, 40), (4, 8)))
    out, arrivals = tmp_path / "serving.json", tmp_path / "arrivals.json"
    sequences = ["--sequences", "1", "4", "--requests", "12"]
    serving.main(["--out", str(out), "--arrivals", str(arrivals), *sequences])
    result = json.loads(out.read_text())
    assert [each["sequences"] for each in result["steady"]] == [1, 4]
    assert [each["prompts"] for each in result["prompts"]] == [1, 16]
    for part in ("saturated", "half leave at half depth", "arrivals"):
        assert result[part]["requests_per_second"] > 0
    assert len(json.loads(arrivals.read_text())) == 12


def test_serving_over_http(imported, tmp_path, monkeypatch):
    bench, shapes = imported("bench.gpu.serving_http"), imported("bench.gpu.shapes")
    monkeypatch.setitem(shapes.SHAPES, "llama2-7b", shapes._spec("llama", 4, 32, 4, 48, 96))
    monkeypatch.setattr(shapes, "POOL", 1 << 12)
    monkeypatch.setattr(imported("bench.gpu.serving"), "LENGTH", 128)
    monkeypatch.setattr(bench, "nvidia_smi", dict)
    for name, value in {"PAST": 20, "NEW": 6, "VOCABULARY": 96}.items():
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "http.json"

    def in_a_thread(listening, loaders, settings):
        [served] = [load() for load in loaders]
        app = create_app(Catalogue([served]), settings)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            asked = ["ask", "--server", f"ours={listening.getsockname()[1]}"]
            bench.main([*asked, "--clients", "1", "3", "--rounds", "2", "--out", str(out)])
        finally:
            server.should_exit = True
            thread.join()
            served.engine.close()

    monkeypatch.setattr(serving_server, "serve", in_a_thread)
    bench.main(["serve", "--port", "0", "--sequences", "4"])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["server"], row["clients"]) for row in rows] == [("ours", 1), ("ours", 3)]
    assert all(row["first_ms"] > 0 for row in rows)


def test_the_shape_that_vllm_serves_instead(imported, tmp_path):
    imported("bench.gpu.serving_http").main(["vllm-model", str(tmp_path / "model")])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
