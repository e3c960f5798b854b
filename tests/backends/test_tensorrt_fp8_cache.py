"""Keys and values in fp8 on the TensorRT backend, on a stand-in for the GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from chain import Chain, build_chain
from click.testing import CliRunner
from tiny_models import make_checkpoint
from tolerances import FP8_CACHE_HIDDEN_RELATIVE
from vectors.cases import DIRECTORY

import ojfa_export
from ojfa_export import backends
from ojfa_export.backends.backend import Engines
from ojfa_export.backends.narrow_cache import has_fp8_cache, with_cache
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import graph_names
from ojfa_export.cli.app import app
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.errors import BackendError
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.exact import HIDDEN, ExactModel
from ojfa_export.verify.verify import verify_bundle

pytestmark = pytest.mark.usefixtures("driver")
LENGTH, PAGE = 40, 64


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def chain(request, tmp_path_factory) -> Chain:
    directory = tmp_path_factory.mktemp(f"fp8-cache-{request.param}")
    checkpoint = make_checkpoint("gpt2", directory / "c", seed=5)
    return build_chain(checkpoint, directory, precision=request.param)


@pytest.fixture(scope="module")
def opened(chain, driver, tmp_path_factory) -> dict[str | None, Engines]:
    """Engines by what their cache is kept in."""
    found: dict[str | None, Engines] = {}
    for cache in (None, "fp8"):
        backend = with_cache(backends.load("tensorrt"), cache, chain.precision)
        directory = tmp_path_factory.mktemp(f"plans-{cache}")
        plans = {name: directory / f"{name}.json" for name in graph_names(chain.spec.blocks)}
        for name, file in plans.items():
            backend.build_engine(chain.spec, chain.graphs / f"{name}.onnx", file)
        found[cache] = backend.open_engines(chain.spec, chain.graphs, plans, None)
    return found


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Of fp16."""
    directory = tmp_path / "gpt2.ojfa"
    shutil.copytree(DIRECTORY / "gpt2.ojfa", directory)
    return directory


def page_bytes(model: Model) -> int:
    """Of a page of keys and values in fp8."""
    spec = model.spec
    return 2 * spec.blocks * spec.kv_heads * spec.head_dim * PAGE


def hidden_of(chain: Chain, engines: Engines, tokens: list[int]) -> np.ndarray:
    """Hidden states of the last tokens at full depth: a prompt, then tokens one by one."""
    session = Session(chain.spec, engines, 1, LENGTH)
    first = len(tokens) - 4
    rows = [session.advance([tokens[:first]])]
    rows += [session.advance([tokens[at : at + 1]]) for at in range(first, len(tokens))]
    return np.concatenate(rows)


def test_what_comes_out_is_that_of_rounded_keys_and_values(chain, opened, rng):
    tokens = rng.integers(chain.spec.vocab_size, size=24).tolist()
    found = hidden_of(chain, opened["fp8"], tokens)
    distances = {}
    for fp8_cache in (True, False):
        exact = ExactModel(chain.spec, chain.graphs, None, fp8_cache=fp8_cache)
        hidden = exact.embed(np.array([tokens], np.int32))
        for block in range(chain.spec.blocks):
            hidden = exact.block(block, hidden)[HIDDEN]
        expected = exact.logits(hidden[0, -5:], chain.spec.blocks)
        distances[fp8_cache] = np.abs(found - expected).max() / np.abs(expected).max()
    assert distances[True] < FP8_CACHE_HIDDEN_RELATIVE
    assert distances[True] < distances[False]


def test_a_number_takes_a_byte(chain, opened):
    for cache, engines in opened.items():
        assert has_fp8_cache(engines) == (cache == "fp8")
        executor = engines.executor(2, 64)
        executor.run(range(1), np.zeros((1, chain.spec.hidden_size), np.float32), [Chunk(0, 0, 1)],
                     long_context=False)  # fmt: skip
        pages, numbers = 2, chain.spec.kv_heads * PAGE * chain.spec.head_dim
        size = 1 if cache == "fp8" else 2
        assert executor._blocks[0]._keys.nbytes == pages * numbers * size


def test_engines_of_a_bundle_are_built_and_verified_with_it(bundle):
    add_engines(bundle, "tensorrt", SILENT, cache="fp8")
    assert Bundle(bundle).engines("tensorrt").built_with["cache"] == "fp8"
    assert all(check.passed for check in verify_bundle(bundle, None, "tensorrt", SILENT))
    model = ojfa_export.load(bundle, backend="tensorrt")
    assert has_fp8_cache(model.engines)
    with ojfa_export.Engine(model, max_sequences=2, kv_cache_bytes=3 * page_bytes(model)) as engine:
        assert engine.stats().pages == 3
        alone = model.generate([3, 4, 5], exit="full", max_new_tokens=12).prompts[0].token_ids
        assert engine.submit([3, 4, 5], max_new_tokens=12).result(60).token_ids == alone
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert "cache fp8" in shown.output
    add_engines(bundle, "tensorrt", SILENT)
    assert "cache" not in Bundle(bundle).engines("tensorrt").built_with


def test_damage_to_rounding_is_seen(bundle, monkeypatch):
    """Verification's tolerance is no blind one: a cache of half the numbers' size doesn't pass."""
    from stand_in.kernels import StandInKernels

    rotated = StandInKernels._rotated
    monkeypatch.setattr(
        StandInKernels, "_rotated", lambda self, heads, *rest: rotated(self, heads, *rest) / 2
    )
    with pytest.raises(ojfa_export.errors.VerificationError):
        add_engines(bundle, "tensorrt", SILENT, cache="fp8")


def test_who_keeps_none(bundle, tmp_path):
    with pytest.raises(BackendError, match="onnxruntime backend keeps no keys and values in fp8"):
        with_cache(backends.load("onnxruntime"), "fp8", "fp16")
    with pytest.raises(BackendError, match="no keys and values in fp8 beside fp32") as refused:
        with_cache(backends.load("tensorrt"), "fp8", "fp32")
    assert "--precision fp16 or bf16" in str(refused.value.hint)
    result = CliRunner().invoke(app, ["build", str(bundle), "--cache", "fp8"])
    assert result.exit_code == 1
    assert "error: the onnxruntime backend keeps no keys and values in fp8" in result.output


def test_a_gpu_or_heads_without_kernels_for_it(chain, tmp_path, monkeypatch):
    from ojfa_export.backends.tensorrt import build
    from ojfa_export.backends.tensorrt.parts import check_fp8_cache

    monkeypatch.setattr(build.the_device(), "compute_capability", (8, 6))
    graph = chain.graphs / "embed.onnx"
    with pytest.raises(BackendError, match=r"in fp8, which need .* 8\.9 or later; .* has 8\.6"):
        build.build_engine(chain.spec, graph, tmp_path / "embed.json", "fp8")
    odd = chain.spec.model_copy(update={"head_dim": 6})
    with pytest.raises(BackendError, match="heads of 6 features, no multiple of 4"):
        check_fp8_cache(odd, "a GPU", (9, 0))
