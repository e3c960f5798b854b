"""A GPU that is the CPU: what of cuda-python the device layer calls, on host memory.

For the logic of backends on a GPU where there is none. Work happens at once; a recorded graph is
the work itself, done again at each launch, so that what a recording must not depend on shows.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

OK = SimpleNamespace(name="CUDA_SUCCESS")
GARBAGE = 0xFF  # bytes of new memory: as floats, NaN


class Driver(ModuleType):
    """The driver's calls."""

    CUresult = SimpleNamespace(
        CUDA_SUCCESS=OK, CUDA_ERROR_OUT_OF_MEMORY=SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=1,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUmemPool_attribute = SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD=1)
    cuuint64_t = int

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.held: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: (OK, 1)

    def cuDriverGetVersion(self):
        return OK, 13000

    def cuDeviceGetName(self, length, handle):
        return OK, b"A stand-in\0"

    def cuDeviceGetAttribute(self, which, handle):
        return OK, which

    def cuMemGetInfo(self):
        return OK, 1 << 30, 1 << 30

    def cuMemAlloc(self, size, stream=None):
        memory = np.full(size + 256, GARBAGE, np.uint8)
        pointer = -(-memory.ctypes.data // 256) * 256
        self.held[pointer] = memory
        return OK, pointer

    cuMemAllocAsync = cuMemAllocHost = cuMemAlloc

    def cuMemFree(self, pointer, stream=None):
        self.held.pop(pointer)[:] = GARBAGE
        return (OK,)

    cuMemFreeAsync = cuMemFreeHost = cuMemFree

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)
        return (OK,)

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = cuMemcpyDtoDAsync

    def cuMemsetD8Async(self, pointer, value, size, stream):
        ctypes.memset(pointer, value, size)
        return (OK,)


def install(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts the stand-in where cuda-python would be; modules that import it are imported anew."""
    driver = Driver()
    for name, module in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", ModuleType("cuda.bindings")),
        ("cuda.bindings.driver", driver),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["cuda.bindings"], "driver", driver, raising=False)
    packages = ("ojfa_export.backends.cuda", "ojfa_export.backends.onnxruntime_cuda")
    for name in [each for each in sys.modules if each.startswith(packages)]:
        monkeypatch.delitem(sys.modules, name)
    from ojfa_export.backends.cuda import device

    class Graph:
        def __init__(self, work):
            self.launch = work

    monkeypatch.setattr(device.Device, "capture", lambda self, work: Graph(work))
    return driver
