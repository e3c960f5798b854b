"""Our CUDA kernels compiled for the CPU (backends/cuda_on_cpu), in place of `kernels.Kernels`."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ojfa_export.backends.cuda.sources import source_directory

HERE = Path(__file__).parent / "backends" / "cuda_on_cpu"
COMPILER = shutil.which("g++")


class CpuKernels:
    """The kernels of some sources; the test is skipped where there is no compiler for them.

    Args:
        program: Of cuda_on_cpu: what includes the sources and finds kernels by name.
        sources: Of engines/kernels.
        macros: That they are compiled with.
        directory: To compile in.

    Attributes:
        library: What was compiled.
    """

    def __init__(
        self, program: str, sources: Sequence[str], macros: Mapping[str, int], directory: Path
    ) -> None:
        for name in ("element.cuh", "common.cuh", "instructions.cuh", program):
            shutil.copy(HERE / name, directory)
        for name in sources:
            shutil.copy(source_directory() / name, directory)
        library = directory / "kernels.so"
        defined = [f"-D{name}={int(value)}" for name, value in macros.items()]
        command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", *defined]
        command += ["-o", str(library), str(directory / program)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        self.library = ctypes.CDLL(str(library))

    def launch(self, name, grid, block, arguments, *, shared_bytes=0, overlapping=False):
        """As `Kernels.launch`."""
        held = [kind(value) for value, kind in arguments]
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        result = self.library.run_kernel(
            name.encode(), (ctypes.c_uint * 3)(*grid), block[0], addresses, shared_bytes
        )
        assert result == 0, name


@functools.cache
def compiler() -> str:
    """One that knows fp16."""
    if COMPILER is None:
        pytest.skip("needs g++")
    command = [COMPILER, "-x", "c++", "-std=c++17", "-fsyntax-only", "-"]
    if subprocess.run(command, input=b"_Float16 x;", capture_output=True, check=False).returncode:
        pytest.skip("this g++ has no _Float16")
    return COMPILER
