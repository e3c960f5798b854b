"""Calls of the driver that fail become errors that say what, where and what to do."""

from __future__ import annotations

import importlib
import json
import sys
import types

import pytest
from stand_in.driver import Driver

from ojfa_export import backends
from ojfa_export.errors import BackendError


def kernels(driver: Driver):
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.cuda.kernels import Kernels

    return Kernels(the_device(), b'{"HALF": 0, "BFLOAT": 0, "FP8_CACHE": 0}')


def launch(compiled, name: str = "transpose") -> None:
    compiled.launch(name, (1, 1, 1), (1, 1, 1), ((0, None),) * 4)


def test_a_kernel_that_fails_is_named(driver):
    driver.failing = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(BackendError, match="kernel 'transpose': illegal_address") as caught:
        launch(kernels(driver))
    assert "start it anew" in caught.value.hint


def test_a_kernel_that_is_missing(driver):
    with pytest.raises(BackendError, match="kernel 'unknown'") as caught:
        launch(kernels(driver), "unknown")
    assert "rebuild the engines" in caught.value.hint


def test_kernels_that_do_not_load(driver):
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.cuda.kernels import Kernels

    with pytest.raises(BackendError, match="loading the kernels") as caught:
        Kernels(the_device(), b"damaged")
    assert "rebuild the engines" in caught.value.hint


def test_no_gpu(driver, monkeypatch):
    monkeypatch.setattr(driver, "cuDeviceGet", lambda _: (driver.status("CUDA_ERROR_NO_DEVICE"), 0))
    module = importlib.import_module("ojfa_export.backends.cuda.device")
    with pytest.raises(BackendError, match="CUDA: no_device") as caught:
        module.Device()
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


def test_nvrtc_that_is_missing(driver, monkeypatch):
    module = importlib.import_module("ojfa_export.backends.cuda.kernels")

    def missing(*_):
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(module.nvrtc, "nvrtcCreateProgram", missing)
    with pytest.raises(BackendError, match=r"NVRTC.*libnvrtc\.so\.13") as caught:
        module.compile_kernels({}, (9, 0))
    assert "pip install" in caught.value.hint


def test_a_library_of_the_sdk_that_is_missing(monkeypatch):
    def missing(_):
        raise OSError("libnvinfer.so.8: cannot open shared object file")

    monkeypatch.setattr(backends, "import_module", missing)
    with pytest.raises(BackendError, match=r"backend 'tensorrt' can't be used: libnvinfer") as e:
        backends.load("tensorrt")
    assert "doctor" in e.value.hint


def test_layers_that_polygraphy_cannot_read(driver, monkeypatch, tmp_path):
    """8.6 writes control characters into the JSON of some; its own words are shown without them."""
    util = types.ModuleType("polygraphy.backend.trt.util")

    def unreadable(*_, **__):
        return json.loads('{"Name": "\x01"}')

    util.str_from_engine = unreadable
    for name in ("polygraphy", "polygraphy.backend", "polygraphy.backend.trt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, util.__name__, util)
    layers = importlib.import_module("ojfa_export.backends.tensorrt.layers")
    engine, context = object(), object()
    monkeypatch.setattr(layers.api, "deserialize", lambda *_: engine)
    monkeypatch.setattr(layers.api, "create_context", lambda *_: context)
    monkeypatch.setattr(layers.api, "layers", lambda _: "Layers:\nnorm\x01 fp32\n")
    (tmp_path / "block.qkv.engine").touch()
    assert layers.describe_layers(tmp_path / "block.qkv.engine") == "Layers:\nnorm fp32\n"
