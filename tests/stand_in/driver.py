"""The CUDA driver's functions, on host memory."""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256

Kernel = Callable[[dict[str, int], tuple[int, int, int], tuple[Any, ...]], None]


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_INVALID_IMAGE = 200


class _AnyNumber:
    """An enum of the driver of which only the names matter."""

    def __getattr__(self, name: str) -> str:
        return name


class _Flags:
    CU_STREAM_NON_BLOCKING = 1


class Driver(ModuleType):
    """A module `cuda.bindings.driver`; calls it doesn't know are AttributeErrors.

    Args:
        kernels: By name.
        name: Of the GPU.
        memory: Its bytes.
        compute_capability: Its.

    Attributes:
        used: Bytes that are taken.
        launched: Names of the kernels that ran.
        failing: A status for the next launch.
    """

    CUresult = CUresult
    CUstream_flags = _Flags
    cuuint64_t = int

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        name: str = "Stand-in GPU",
        memory: int = 1 << 30,
        compute_capability: tuple[int, int] = (9, 0),
    ) -> None:
        super().__init__("cuda.bindings.driver")
        self._kernels, self.name, self.memory = kernels, name, memory
        self._capability = compute_capability
        self.used, self.launched = 0, []
        self.failing: CUresult | None = None
        self._buffers: dict[int, tuple[Any, int]] = {}
        self._recording: list[Callable[[], None]] | None = None
        for kind in (
            "CUdevice_attribute",
            "CUmemPool_attribute",
            "CUstreamCaptureMode",
            "CUlaunchAttributeID",
            "CUfunction_attribute",
        ):
            setattr(self, kind, _AnyNumber())
        self.CUlaunchConfig = SimpleNamespace
        self.CUlaunchAttribute = lambda: SimpleNamespace(value=SimpleNamespace())
        for nothing in (
            "cuInit", "cuCtxSetCurrent", "cuStreamSynchronize", "cuMemPoolSetAttribute",
            "cuGraphDestroy", "cuGraphUpload", "cuGraphExecDestroy", "cuFuncSetAttribute",
            "cuMemPoolTrimTo",
        ):  # fmt: skip
            setattr(self, nothing, lambda *_: (CUresult.CUDA_SUCCESS,))
        for handle in (
            "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamCreate",
            "cuDeviceGetDefaultMemPool",
        ):  # fmt: skip
            setattr(self, handle, lambda *_: (CUresult.CUDA_SUCCESS, 1))

    def do(self, work: Callable[[], None]) -> tuple[CUresult]:
        """Does something that is on the stream, or records it."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)
        return (CUresult.CUDA_SUCCESS,)

    def cuGetErrorString(self, status: CUresult) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, status.name.removeprefix("CUDA_ERROR_").lower().encode()

    def cuDeviceGetName(self, size: int, _: int) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, self.name.encode().ljust(size, b"\0")

    def cuDriverGetVersion(self) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 13000

    def cuDeviceGetAttribute(self, which: str, _: int) -> tuple[CUresult, int]:
        major, minor = self._capability
        given = {"MAJOR": major, "MINOR": minor, "MULTIPROCESSOR_COUNT": 4}
        return CUresult.CUDA_SUCCESS, next(v for k, v in given.items() if which.endswith(k))

    # Memory

    def cuMemGetInfo(self) -> tuple[CUresult, int, int]:
        return CUresult.CUDA_SUCCESS, self.memory - self.used, self.memory

    def cuMemPoolGetAttribute(self, *_: Any) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 0

    def cuMemAlloc(self, size: int) -> tuple[CUresult, int]:
        if self.used + size > self.memory:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        buffer = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # NaN: nothing is zero by itself
        pointer = buffer.ctypes.data + -buffer.ctypes.data % ALIGNMENT
        self._buffers[pointer] = (buffer, size)
        self.used += size
        return CUresult.CUDA_SUCCESS, pointer

    def cuMemAllocAsync(self, size: int, _: Any) -> tuple[CUresult, int]:
        return self.cuMemAlloc(size)

    def cuMemFree(self, pointer: int) -> tuple[CUresult]:
        buffer, size = self._buffers.pop(pointer)
        buffer[:] = 0xFF
        self.used -= size
        return (CUresult.CUDA_SUCCESS,)

    def cuMemFreeAsync(self, pointer: int, _: Any) -> tuple[CUresult]:
        return self.cuMemFree(pointer)

    def cuMemAllocHost(self, size: int) -> tuple[CUresult, int]:
        buffer = np.empty(size, np.uint8)
        self._buffers[buffer.ctypes.data] = (buffer, 0)
        return CUresult.CUDA_SUCCESS, buffer.ctypes.data

    def cuMemFreeHost(self, pointer: int) -> tuple[CUresult]:
        return self.cuMemFree(pointer)

    def check_inside(self, pointer: int, size: int) -> None:
        """Whether an address and what follows lie in one allocation: else it would crash a GPU."""
        for start, (_, held) in self._buffers.items():
            if start <= pointer and pointer + size <= start + held:
                return
        raise AssertionError(f"{size} bytes at {pointer:#x} are in no allocation")

    def cuMemcpyHtoDAsync(self, target: int, host: int, size: int, _: Any) -> tuple[CUresult]:
        self.check_inside(target, size)
        if self._recording is None:
            ctypes.memmove(target, host, size)
            return (CUresult.CUDA_SUCCESS,)
        return self.do(lambda: ctypes.memmove(target, host, size) and None)

    def cuMemcpyDtoHAsync(self, host: int, source: int, size: int, _: Any) -> tuple[CUresult]:
        self.check_inside(source, size)
        return self.do(lambda: ctypes.memmove(host, source, size) and None)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, _: Any) -> tuple[CUresult]:
        self.check_inside(target, size)
        self.check_inside(source, size)
        return self.do(lambda: ctypes.memmove(target, source, size) and None)

    def cuMemsetD8Async(self, target: int, value: int, size: int, _: Any) -> tuple[CUresult]:
        self.check_inside(target, size)
        return self.do(lambda: ctypes.memset(target, value, size) and None)

    # Graphs

    def cuStreamBeginCapture(self, *_: Any) -> tuple[CUresult]:
        self._recording = []
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, _: Any) -> tuple[CUresult, list[Callable[[], None]]]:
        recorded, self._recording = self._recording, None
        assert recorded is not None
        return CUresult.CUDA_SUCCESS, recorded

    def cuGraphInstantiate(self, recorded: Any, _: int) -> tuple[CUresult, Any]:
        return CUresult.CUDA_SUCCESS, recorded

    def cuGraphLaunch(self, graph: list[Callable[[], None]], _: Any) -> tuple[CUresult]:
        for work in graph:
            work()
        return (CUresult.CUDA_SUCCESS,)

    # Kernels

    def cuModuleLoadData(self, code: bytes) -> tuple[CUresult, dict[str, int] | None]:
        try:
            return CUresult.CUDA_SUCCESS, json.loads(code)
        except ValueError:
            return CUresult.CUDA_ERROR_INVALID_IMAGE, None

    def cuModuleGetFunction(
        self, macros: dict[str, int], name: bytes
    ) -> tuple[CUresult, tuple[str, dict[str, int]] | None]:
        if name.decode() not in self._kernels:
            return CUresult.CUDA_ERROR_NOT_FOUND, None
        return CUresult.CUDA_SUCCESS, (name.decode(), macros)

    def cuLaunchKernelEx(
        self,
        config: Any,
        function: tuple[str, dict[str, int]],
        arguments: tuple[tuple[Any, ...], tuple[Any, ...]],
        _: int,
    ) -> tuple[CUresult]:
        if self.failing is not None:
            status, self.failing = self.failing, None
            return (status,)
        (name, macros), (values, types) = function, arguments
        assert len(values) == len(types)
        self.launched.append(name)
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        return self.do(lambda: self._kernels[name](macros, grid, values))
