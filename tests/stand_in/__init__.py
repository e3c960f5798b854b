"""Stand-ins for the CUDA driver, NVRTC and TensorRT: the whole TensorRT backend on a CPU.

"Device memory" is host memory of a limited amount, kernels are NumPy, engines run in ONNX Runtime.
They show that the Python code around kernels and engines is right: what is built, loaded, launched
with which arguments, freed and refused. They say nothing of the kernels themselves: tests/gpu does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from stand_in.driver import Driver
from stand_in.kernels import KERNELS, compiler
from stand_in.tensorrt import make_tensorrt

PACKAGE = "ojfa_export.backends.tensorrt"


@contextmanager
def stand_in_gpu(**device: object) -> Iterator[Driver]:
    """Puts the stand-ins where the SDKs would be, and takes the backend's modules away after.

    Args:
        device: Of `Driver`: name, memory, compute capability.
    """
    driver = Driver(KERNELS, **device)
    cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.driver, bindings.nvrtc = driver, compiler()  # type: ignore[attr-defined]
    cuda.bindings = bindings  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OJFA_DECODE", "engines")  # of the kernels, those that every step needs
        for name, module in (
            ("cuda", cuda),
            ("cuda.bindings", bindings),
            ("cuda.bindings.driver", driver),
            ("cuda.bindings.nvrtc", bindings.nvrtc),
            ("tensorrt", make_tensorrt(driver)),
        ):
            module.__spec__ = ModuleSpec(name, None)  # what asks for packages looks at it
            patch.setitem(sys.modules, name, module)
        _forget()
        try:
            yield driver
        finally:
            _forget()


def _forget() -> None:
    import ojfa_export.backends as package

    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]
    if hasattr(package, "tensorrt"):
        del package.tensorrt
