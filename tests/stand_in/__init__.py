"""Stand-ins for the CUDA driver, NVRTC, TensorRT and ONNX Runtime: backends for GPUs on a CPU.

"Device memory" is host memory of a limited amount, kernels are NumPy, engines run in ONNX Runtime.
They show that the Python code around kernels and engines is right: what is built, loaded, launched
with which arguments, freed and refused. They say nothing of the kernels themselves: tests/gpu does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stand_in.compiler import make_compiler
from stand_in.cublas import make_cublas
from stand_in.driver import Driver
from stand_in.tensorrt import make_tensorrt

PACKAGE = "ojfa_export.backends"
FOLDERS = ("cuda", "onnxruntime_cuda", "tensorrt")


@contextmanager
def stand_in_gpu() -> Iterator[Driver]:
    """Puts the stand-ins where the SDKs would be, and takes the backend's modules away after."""
    driver, compiler = Driver(), make_compiler()
    cuda: Any = ModuleType("cuda")
    bindings: Any = ModuleType("cuda.bindings")
    cuda.bindings, bindings.driver, bindings.nvrtc = bindings, driver, compiler
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (
            ("cuda", cuda),
            ("cuda.bindings", bindings),
            ("cuda.bindings.driver", driver),
            ("cuda.bindings.nvrtc", compiler),
            ("tensorrt", make_tensorrt(driver)),
        ):
            module.__spec__ = ModuleSpec(name, None)  # what asks for packages looks at it
            patch.setitem(sys.modules, name, module)
        before = _take_away()
        try:
            from ojfa_export.backends.cuda import cublas, mailbox

            patch.setattr(cublas, "Cublas", make_cublas(driver))
            patch.setattr(cublas, "cublas_version", lambda device: "13.0")

            def look_again(_: float) -> None:  # who waits for an answer lets the stream go on
                driver.progress(int(driver.rng.integers(1, 4)))

            patch.setattr(mailbox, "time", SimpleNamespace(sleep=look_again))
            yield driver
        finally:
            _take_away()
            sys.modules.update(before)


def _take_away() -> dict[str, ModuleType]:
    """Removes the backend's modules, so that they are imported anew."""
    import ojfa_export.backends as package

    folders = [f"{PACKAGE}.{folder}" for folder in FOLDERS]
    names = [name for name in sys.modules if ".".join(name.split(".")[:3]) in folders]
    for folder in FOLDERS:
        if hasattr(package, folder):
            delattr(package, folder)
    return {name: sys.modules.pop(name) for name in names}
