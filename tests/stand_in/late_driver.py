"""A driver that is late: what is put on the stream runs as late as it may.

Some of it runs whenever the host looks for an answer, so that code which reads or overwrites
something too early finds the wrong bytes; fresh and freed memory is full of NaN.
"""

from __future__ import annotations

import ctypes
import json
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from stand_in.kernels import ALLOCATIONS, StandInKernels

SMS = 5  # multiprocessors: no round number of anything


class Constant(int):
    """A member of one of the driver's enumerations."""

    name: str


class Enumeration:
    def __init__(self, **values: int) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Constant:
        constant = Constant(self._values.get(name, abs(hash(name)) % 100_000))
        constant.name = name
        return constant


SUCCESS = Constant(0)
SUCCESS.name = "CUDA_SUCCESS"


class StandInDriver(types.ModuleType):
    """What of `cuda.bindings.driver` the backend uses."""

    CUresult = Enumeration(CUDA_SUCCESS=0, CUDA_ERROR_NOT_READY=600)
    CUdevice_attribute = Enumeration()
    CUstream_flags = Enumeration()
    CUmemPool_attribute = Enumeration()
    CUstreamCaptureMode = Enumeration()
    CUlaunchAttributeID = Enumeration()
    CUfunction_attribute = Enumeration()
    CUevent_flags = Enumeration()
    CUlaunchConfig = types.SimpleNamespace
    cuuint64_t = int

    def __init__(self, seed: int) -> None:
        super().__init__("cuda.bindings.driver")
        self.rng = np.random.default_rng(seed)
        self.memory: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.stream: list[Callable[[], None]] = []
        self.running = False
        self.ran = 0  # of what was on the stream
        self.lock = threading.RLock()
        self.recording: list[Callable[[], None]] | None = None
        self.beside: list[Callable[[], None]] = []  # on the second stream
        self.forked_at = 0
        self.launched: list[str] = []

    def CUlaunchAttribute(self) -> Any:
        return types.SimpleNamespace(value=types.SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu"):
            return lambda *_: (SUCCESS, 0)
        raise AttributeError(name)

    def put(self, work: Callable[[], None], stream: int = 0) -> None:
        now = self.stream if self.recording is None else self.recording
        (self.beside if stream else now).append(work)

    def progress(self, most: int | None = None) -> None:
        """Runs some of what is on the stream, all of it by default."""
        with self.lock:  # garbage is collected in any thread
            if self.running:  # one after the other, whatever garbage is collected meanwhile
                return
            assert self.recording is None
            count = len(self.stream) if most is None else min(most, len(self.stream))
            self.running = True
            try:
                for _ in range(count):
                    self.ran += 1
                    self.stream.pop(0)()
            finally:
                self.running = False

    def cuCtxGetStreamPriorityRange(self) -> Any:
        return SUCCESS, 0, -5

    def cuStreamCreateWithPriority(self, *_: Any) -> Any:
        return SUCCESS, 1

    def cuStreamWaitEvent(self, stream: int, *_: Any) -> Any:
        """Forks, or joins: what is on the second stream happens at some time in between."""
        if stream:
            self.forked_at = 0 if self.recording is None else len(self.recording)
        elif self.recording is None:  # some of what was launched since may have run
            self.stream += self.beside
            self.beside = []
        else:
            at = self.forked_at
            for work in self.beside:
                at = int(self.rng.integers(at, len(self.recording) + 1))
                self.recording.insert(at, work)
                at += 1
            self.beside = []
        return (SUCCESS,)

    def cuDeviceGetName(self, *_: Any) -> Any:
        return SUCCESS, b"stand-in\0"

    def cuDriverGetVersion(self) -> Any:
        return SUCCESS, 13000

    def cuMemGetInfo(self) -> Any:
        return SUCCESS, 1 << 40, 1 << 40

    def cuDeviceGetAttribute(self, which: Constant, _: Any) -> Any:
        return SUCCESS, {
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MULTIPROCESSOR_COUNT": SMS,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
        }[which.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuStreamSynchronize(self, _: Any) -> Any:
        self.progress()
        return (SUCCESS,)

    def cuEventRecord(self, event: list[int], stream: Any) -> Any:
        if self.recording is None:
            event[0] = len(self.stream) + self.ran
        return (SUCCESS,)

    def cuEventCreate(self, _: Any) -> Any:
        return SUCCESS, [0]

    def cuEventSynchronize(self, event: list[int]) -> Any:
        """Runs what was on the stream before the event, and no more."""
        self.progress(max(0, event[0] - self.ran))
        return (SUCCESS,)

    def cuStreamQuery(self, _: Any) -> Any:
        self.progress(1)
        return (self.CUresult.CUDA_ERROR_NOT_READY if self.stream else SUCCESS,)

    def cuStreamBeginCapture(self, *_: Any) -> Any:
        self.recording = []
        return (SUCCESS,)

    def cuStreamEndCapture(self, _: Any) -> Any:
        recorded, self.recording = self.recording, None
        return SUCCESS, recorded

    def cuGraphInstantiate(self, recorded: Any, _: Any) -> Any:
        return SUCCESS, recorded

    def cuGraphLaunch(self, graph: Any, _: Any) -> Any:
        self.launched.append("graph")
        for work in graph:
            self.put(work)
        return (SUCCESS,)

    def cuMemAlloc(self, size: int) -> Any:
        buffer = ctypes.create_string_buffer(b"\xff" * size, size + 256)
        aligned = -(-ctypes.addressof(buffer) // 256) * 256
        ctypes.memset(ctypes.addressof(buffer), 0xFF, size + 256)
        self.memory[aligned] = (buffer, size)
        ALLOCATIONS.add(aligned, buffer, size)
        return SUCCESS, aligned

    def cuMemAllocAsync(self, size: int, _: Any) -> Any:
        return self.cuMemAlloc(size)

    def cuMemAllocHost(self, size: int) -> Any:
        status, pointer = self.cuMemAlloc(size)
        self.pinned.add(pointer)
        return status, pointer

    def cuMemFree(self, pointer: int) -> Any:
        """When the stream gets there. A GPU's driver would wait for it at once, but this is called
        where garbage is collected: NumPy and Python's own compiler break if kernels run in there.
        """
        return self.cuMemFreeAsync(pointer, 0)

    def cuMemFreeHost(self, pointer: int) -> Any:
        return self.cuMemFree(pointer)

    def cuMemFreeAsync(self, pointer: int, _: Any) -> Any:
        self.stream.append(lambda: self._free(pointer))  # no part of what is recorded meanwhile
        return (SUCCESS,)

    def _free(self, pointer: int) -> None:
        _, size = self.memory[pointer]
        ALLOCATIONS.drop(pointer)
        ctypes.memset(pointer, 0xFF, size)  # who reads it finds that, or is told

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: Any) -> Any:
        # A copy, as garbage that is collected meanwhile frees memory; tuple() would iterate first.
        for start in self.pinned.copy():
            _, held = self.memory.get(start, (None, 0))
            if start <= source < start + held:  # read as late as it may be
                return self.cuMemcpyDtoHAsync(target, source, size, stream)
        data = ctypes.string_at(source, size)  # pageable memory is taken at once
        self.put(lambda: _move(target, data, size))
        return (SUCCESS,)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, _: Any) -> Any:
        self.put(lambda: _move(target, source, size))
        return (SUCCESS,)

    cuMemcpyDtoDAsync = cuMemcpyDtoHAsync

    def cuMemsetD8Async(self, pointer: int, value: int, size: int, _: Any) -> Any:
        def fill() -> None:
            ALLOCATIONS.check(pointer, size)
            ctypes.memset(pointer, value, size)

        self.put(fill)
        return (SUCCESS,)

    def cuModuleLoadData(self, code: bytes) -> Any:
        return SUCCESS, StandInKernels(json.loads(code))

    def cuModuleGetFunction(self, module: Any, name: bytes) -> Any:
        return SUCCESS, (module, name.decode())

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, _: Any) -> Any:
        module, name = function
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        self.launched.append(name)
        threads = config.blockDimX
        self.put(lambda: module.run(name, grid, arguments[0], threads), config.hStream)
        return (SUCCESS,)


def _move(target: int, source: int | bytes, size: int) -> None:
    for pointer in (target, source):
        if isinstance(pointer, int):
            ALLOCATIONS.check(pointer, size)
    ctypes.memmove(target, source, size)
