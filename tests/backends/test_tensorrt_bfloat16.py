"""Models in bf16 on the TensorRT backend: kernels and cuBLASLt alone, on a stand-in for the GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chain import Chain, build_chain
from stand_in.tensorrt import Builder
from tiny_models import make_checkpoint

from ojfa_export import backends
from ojfa_export.backends.backend import Engines
from ojfa_export.backends.precisions import check_precision
from ojfa_export.bundle.names import graph_names
from ojfa_export.errors import BackendError
from ojfa_export.runtime.session import Session


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    directory = tmp_path_factory.mktemp("bf16")
    return build_chain(
        make_checkpoint("gpt2", directory / "c", seed=5), directory, precision="bf16"
    )


@pytest.fixture(scope="module")
def plans(chain, driver, tmp_path_factory) -> dict[str, Path]:
    from ojfa_export.backends.tensorrt.backend import BACKEND

    directory, built = tmp_path_factory.mktemp("plans"), len(Builder.built)
    files = {name: directory / f"{name}.json" for name in graph_names(chain.spec.blocks)}
    for name, file in files.items():
        BACKEND.build_engine(chain.spec, chain.graphs / f"{name}.onnx", file)
    assert len(Builder.built) == built
    assert not list(directory.glob("*.engine"))
    return files


def opened(chain: Chain, plans: dict[str, Path]) -> Engines:
    from ojfa_export.backends.tensorrt.backend import BACKEND

    return BACKEND.open_engines(chain.spec, chain.graphs, plans, None)


def test_progress_counts_no_engine(chain, driver):
    from ojfa_export.backends.tensorrt.backend import BACKEND

    names = {
        name: BACKEND.engine_names(chain.spec, chain.graphs / f"{name}.onnx")
        for name in graph_names(chain.spec.blocks)
    }
    assert names.pop("embed") == ["kernels"]
    assert not any(names.values())


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_the_exit_head_of_any_rows_needs_no_engine(chain, plans, rng, rows):
    hidden = rng.normal(size=(rows, chain.spec.hidden_size)).astype(np.float32)
    for blocks_run in (1, chain.spec.blocks):
        found = opened(chain, plans).logits(hidden, blocks_run)
        expected = chain.engines.logits(hidden, blocks_run)
        np.testing.assert_allclose(found, expected, atol=3e-2 * np.abs(expected).max(), rtol=0)


def test_the_cache_is_of_16_bits(chain, plans, driver):
    engines, before = opened(chain, plans), driver.used
    session = Session(chain.spec, engines, 1, 64)
    session.advance([[1, 2, 3]])
    assert engines.cache_element_bytes == 2
    assert driver.used > before


def test_engines_that_are_asked_for_are_refused(chain, plans, monkeypatch):
    monkeypatch.setenv("OJFA_DECODE", "engines")
    with pytest.raises(BackendError, match="bf16 has no engines of TensorRT") as refused:
        opened(chain, plans)
    assert "--precision fp16" in str(refused.value.hint)


def test_cublas_is_needed(chain, plans, driver, monkeypatch, tmp_path):
    from ojfa_export.backends.cuda import cublas
    from ojfa_export.backends.tensorrt import build
    from ojfa_export.backends.tensorrt import opened as module

    def missing(device: object) -> None:
        raise BackendError("cuBLASLt was not found", hint=cublas.NO_CUBLAS)

    monkeypatch.setattr(module, "Cublas", missing)
    monkeypatch.setattr(build, "Cublas", missing)
    with pytest.raises(BackendError, match="need cuBLASLt in bf16") as refused:
        opened(chain, plans)
    assert "nvidia-cublas" in str(refused.value.hint)
    with pytest.raises(BackendError, match="cuBLASLt was not found"):
        build.build_engine(chain.spec, chain.graphs / "embed.onnx", tmp_path / "embed.json")


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size"])
def test_sizes_that_kernels_cannot_load(chain, driver, field):
    from ojfa_export.backends.tensorrt.parts import check_rows

    check_rows(chain.spec, "bf16")
    odd = chain.spec.model_copy(update={field: 68})
    check_rows(odd, "fp16")  # an engine runs it
    with pytest.raises(BackendError, match="68 features, which is no multiple of 8") as refused:
        check_rows(odd, "bf16")
    assert "--precision fp16" in str(refused.value.hint)


def test_an_older_gpu_is_refused(chain, driver, tmp_path, monkeypatch):
    from ojfa_export.backends.tensorrt import build

    device = build.the_device()
    monkeypatch.setattr(device, "compute_capability", (7, 5))
    with pytest.raises(BackendError, match=r"capability 8\.0 or later; .* has 7\.5"):
        build.build_engine(chain.spec, chain.graphs / "embed.onnx", tmp_path / "embed.json")


def test_other_backends(driver):
    for name in ("onnxruntime", "tensorrt"):
        check_precision(backends.load(name), "bf16")
    pytest.importorskip("onnxruntime")
    limited = backends.load("onnxruntime-cuda")
    with pytest.raises(BackendError, match="in bf16, which the onnxruntime-cuda backend doesn't"):
        check_precision(limited, "bf16")
    check_precision(limited, "fp16")
