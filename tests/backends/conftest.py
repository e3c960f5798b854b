"""The TensorRT backend over a stand-in for the GPU."""

from __future__ import annotations

import sys
import types

import pytest
from backends.stand_in_gpu import StandInDriver, StandInEngine

PACKAGES = ("ojfa_export.backends.tensorrt.", "ojfa_export.backends.cuda.")
API = "ojfa_export.backends.tensorrt.api"
MODULES = ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc", API)


@pytest.fixture(scope="module")
def driver():
    """The backend's modules imported over the stand-in, and taken out again."""
    names = [name for name in sys.modules if name.startswith(PACKAGES)]
    before = {name: sys.modules.pop(name) for name in (*names, *MODULES) if name in sys.modules}
    driver = StandInDriver(seed=3)
    nvrtc, bindings = types.ModuleType("nvrtc"), types.ModuleType("bindings")
    bindings.driver, bindings.nvrtc = driver, nvrtc
    stand_ins = (types.ModuleType("cuda"), bindings, driver, nvrtc, types.ModuleType(API))
    sys.modules.update(zip(MODULES, stand_ins, strict=True))
    from ojfa_export.backends.tensorrt import engine, mailbox

    def look_again(_: float) -> None:
        driver.progress(int(driver.rng.integers(1, 4)))

    mailbox.time = types.SimpleNamespace(sleep=look_again)
    engine.Engine = lambda device, path: StandInEngine(driver, path)
    yield driver
    for name in [n for n in sys.modules if n.startswith(PACKAGES)]:
        del sys.modules[name]
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)
