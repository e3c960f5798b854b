"""Models of three families, as bundles; two of them also on a stand-in for a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from vectors.cases import DIRECTORY, open_bundle

import ojfa_export
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT


@pytest.fixture(scope="session", params=["llama", "gpt2", "phi3"])
def model(request) -> Model:
    """Phi-3 with LongRoPE, whose rotation switches within the cache."""
    return open_bundle(request.param)


@pytest.fixture(scope="session")
def llama() -> Model:
    return open_bundle("llama")


@dataclass(frozen=True)
class OnDevice:
    """A model over the stand-in's driver, and the same one on the CPU."""

    driver: Any
    model: Model
    reference: Model


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from stand_in import stand_in_gpu
    from stand_in.onnxruntime_cuda import make_onnxruntime

    with stand_in_gpu() as driver, pytest.MonkeyPatch.context() as patch:
        from ojfa_export.backends.onnxruntime_cuda import provider

        patch.setattr(provider, "ort", make_onnxruntime(driver))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield driver


# GPT-2's stored bundle is of fp16: its tokens are not those of fp32.
@pytest.fixture(
    scope="module",
    params=[("llama", "tensorrt"), ("phi3", "tensorrt"), ("llama", "onnxruntime-cuda")],
    ids="-".join,
)
def on_device(request, driver, tmp_path_factory) -> OnDevice:
    return _open(*request.param, driver, tmp_path_factory)


@pytest.fixture(scope="module")
def llama_on_device(driver, tmp_path_factory) -> OnDevice:
    return _open("llama", "tensorrt", driver, tmp_path_factory)


def _open(
    name: str, backend: str, driver: Any, tmp_path_factory: pytest.TempPathFactory
) -> OnDevice:
    bundle = tmp_path_factory.mktemp(name) / f"{name}.ojfa"
    shutil.copytree(DIRECTORY / f"{name}.ojfa", bundle)
    add_engines(bundle, backend, SILENT)
    return OnDevice(driver, ojfa_export.load(bundle, backend=backend), open_bundle(name))
