"""A GPU that is the CPU: what of cuda-python the device layer calls, on host memory.

For the logic of backends on a GPU where there is none. Work happens at once; a recorded graph is
the work itself, done again at each launch, so that what a recording must not depend on shows.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUmemPool_attribute = SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD=1)
    cuuint64_t = int

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.held: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: (OK, 1)

    def cuCtxGetStreamPriorityRange(self):
        return OK, 0, -5

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


@contextmanager
def installed() -> Iterator[Driver]:
    """Puts the stand-in where cuda-python would be, for modules that are then imported anew."""
    driver, bindings = Driver(), ModuleType("cuda.bindings")
    bindings.driver = driver
    modules = {"cuda": ModuleType("cuda"), "cuda.bindings": bindings}
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {**modules, "cuda.bindings.driver": driver}.items():
            patch.setitem(sys.modules, name, module)
        from ojfa_export.backends.cuda import device

        def capture(self: object, work: Callable[[], None]) -> SimpleNamespace:
            return SimpleNamespace(launch=work)

        patch.setattr(device.Device, "capture", capture)
        yield driver
        _forget()


def _forget() -> None:
    packages = ("ojfa_export.backends.cuda", "ojfa_export.backends.onnxruntime_cuda")
    for name in [each for each in sys.modules if each.startswith(packages)]:
        del sys.modules[name]
