"""The stand-in's driver with what can go wrong on a GPU: memory that ends, kernels that fail."""

from __future__ import annotations

import ctypes
from typing import Any

from stand_in.kernels import StandInKernels
from stand_in.late_driver import SUCCESS, StandInDriver

ALIGNMENT = 256


class Driver(StandInDriver):
    """A module `cuda.bindings.driver` with a limited amount of memory.

    Args:
        memory: Bytes that there are.
        name: Of the GPU.
        seed: Of when what is on the stream runs.

    Attributes:
        total: Bytes that there are; may be changed.
        used: Bytes that are taken.
        failing: Name of the status that the next launch gives, if any.
    """

    def __init__(self, memory: int = 1 << 30, name: str = "Stand-in GPU", seed: int = 5) -> None:
        super().__init__(seed)
        self.total, self.used, self.gpu = memory, 0, name
        self.failing: str | None = None

    def status(self, name: str) -> Any:
        """A result of the driver."""
        return getattr(self.CUresult, name)

    def cuGetErrorString(self, status: Any) -> Any:
        return SUCCESS, status.name.removeprefix("CUDA_ERROR_").lower().encode()

    def cuDeviceGetName(self, *_: Any) -> Any:
        return SUCCESS, self.gpu.encode() + b"\0"

    def cuMemGetInfo(self) -> Any:
        self.progress()  # what was freed on the way
        return SUCCESS, self.total - self.used, self.total

    def cuMemAlloc(self, size: int) -> Any:
        if self.used + size > self.total and self.recording is None:
            self.progress()  # what was freed on the way
        if self.used + size > self.total:
            return self.status("CUDA_ERROR_OUT_OF_MEMORY"), 0
        self.used += size
        return super().cuMemAlloc(size)

    def _free(self, pointer: int) -> None:
        super()._free(pointer)
        self.used -= self.memory.pop(pointer)[1]
        self.pinned.discard(pointer)

    def check_inside(self, pointer: int, size: int) -> None:
        """Whether an address and what follows lie in one allocation."""
        for start, (_, held) in self.memory.copy().items():
            if start <= pointer and pointer + size <= start + held:
                return
        raise AssertionError(f"{size} bytes at {pointer:#x} are in no allocation")

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: Any) -> Any:
        """Refuses to go beyond an allocation, as a GPU does."""
        for pointer in (target, source):
            self.check_inside(pointer, size)
        return super().cuMemcpyDtoDAsync(target, source, size, stream)

    def cuModuleLoadData(self, code: bytes) -> Any:
        try:
            return super().cuModuleLoadData(code)
        except ValueError:
            return self.status("CUDA_ERROR_INVALID_IMAGE"), None

    def cuModuleGetFunction(self, module: Any, name: bytes) -> Any:
        kind, _, tokens = name.decode().rpartition("_")
        known = hasattr(StandInKernels, kind if tokens.isdigit() else name.decode())
        if not known:
            return self.status("CUDA_ERROR_NOT_FOUND"), None
        return super().cuModuleGetFunction(module, name)

    def cuLaunchKernelEx(self, *arguments: Any) -> Any:
        if self.failing is not None:
            name, self.failing = self.failing, None
            return (self.status(name),)
        return super().cuLaunchKernelEx(*arguments)


def poke(target: bytes, data: bytes) -> None:
    """Writes into the memory of bytes, as the SDK's bindings do."""
    ctypes.memmove(target, data, len(data))
