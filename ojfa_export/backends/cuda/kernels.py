"""Compiling and launching the CUDA kernels of engines/kernels for one model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from cuda.bindings import driver, nvrtc

from ojfa_export.backends.cuda.device import Device, check
from ojfa_export.backends.cuda.sources import HEADERS, SOURCES, source_directory
from ojfa_export.errors import BackendError

# Dynamic shared memory that needs no permission: 48 KiB less what kernels declare themselves.
PLAIN_SHARED_BYTES = 32 << 10
# Percent of a multiprocessor's memory that is shared memory rather than first-level cache: all, and
# for every kernel. A multiprocessor must be empty to divide it otherwise, and a kernel that wants
# that can't start while the one before it ends.
SHARED_PERCENT = 100
Argument = tuple[Any, Any]  # a value and its ctypes type


def compile_kernels(
    macros: dict[str, int],
    compute_capability: tuple[int, int],
    sources: Sequence[str] = SOURCES,
) -> bytes:
    """Compiles the kernels to machine code.

    Args:
        macros: See `sources.definitions`.
        compute_capability: Of the GPU.
        sources: The files that are wanted.

    Raises:
        BackendError: The sources are missing or don't compile.
    """
    directory = source_directory()
    names = [*sources, *HEADERS]
    texts = [(directory / name).read_bytes() for name in names]
    whole = "".join(f'#include "{name}"\n' for name in sources).encode()
    try:
        status, program = nvrtc.nvrtcCreateProgram(
            whole, b"kernels.cu", len(names), texts, [name.encode() for name in names]
        )
    except RuntimeError as error:  # cuda-python's, where the library isn't there
        raise BackendError(
            f"NVRTC, which compiles the CUDA kernels, was not found: {error}",
            hint="pip install nvidia-cuda-nvrtc, of the driver's CUDA version",
        ) from error
    _check_nvrtc(status)
    major, minor = compute_capability
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(
            f"the CUDA kernels don't compile for sm_{major}{minor}: {log.decode().strip()}",
            hint="please report this with the model's config.json",
        )
    status, size = nvrtc.nvrtcGetCUBINSize(program)
    _check_nvrtc(status)
    code = bytes(size)
    _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, code)[0])
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _check_nvrtc(status: Any) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC: {status.name}", hint="see 'ojfa-export doctor'")


class Kernels:
    """The compiled kernels of one model on one device.

    Args:
        device: Where they run.
        code: From `compile_kernels`.
    """

    def __init__(self, device: Device, code: bytes) -> None:
        self._device = device
        self._code = code  # the module refers to it
        self._module = check(driver.cuModuleLoadData(code), "loading the kernels")
        self._functions: dict[str, Any] = {}
        # A kernel may start while the one before it ends, from compute capability 9.0 on.
        self._overlapping = device.compute_capability >= (9, 0)

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: tuple[Argument, ...],
        *,
        shared_bytes: int = 0,
        overlapping: bool = False,
    ) -> None:
        """Puts a kernel on the stream.

        Args:
            name: Of the kernel.
            grid: Thread blocks.
            block: Threads of a block.
            arguments: Values with their ctypes types.
            shared_bytes: Dynamic shared memory.
            overlapping: Whether it waits by itself for the kernel before it.
        """
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_bytes
        config.hStream = self._device.stream
        if overlapping and self._overlapping:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        values, types = (tuple(argument[i] for argument in arguments) for i in (0, 1))
        function = self._function(name, shared_bytes)
        launched = driver.cuLaunchKernelEx(config, function, (values, types), 0)
        check(launched, f"kernel '{name}'")

    def _function(self, name: str, shared_bytes: int) -> Any:
        if name not in self._functions:
            found = driver.cuModuleGetFunction(self._module, name.encode())
            function = check(found, f"kernel '{name}'")
            which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            check(driver.cuFuncSetAttribute(function, which, SHARED_PERCENT))
            self._functions[name] = function
        function = self._functions[name]
        if shared_bytes > PLAIN_SHARED_BYTES:
            which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, which, shared_bytes))
        return function


def pointer(value: int | None) -> Argument:
    """A device address, or none."""
    return value or 0, ctypes.c_void_p


def integer(value: int) -> Argument:
    """An int argument."""
    return value, ctypes.c_int


def number(value: float) -> Argument:
    """A float argument."""
    return value, ctypes.c_float


def wide_number(value: float) -> Argument:
    """A double argument."""
    return value, ctypes.c_double
