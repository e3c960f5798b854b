"""The attention kernels against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from attention_cases import VARIANTS, Example, Variant
from tolerances import ATTENTION_FP16_RELATIVE, ATTENTION_FP32_RELATIVE

from ojfa_export.backends.tensorrt.attention import Attention, Scratch
from ojfa_export.backends.tensorrt.sources import source_directory

HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++")
MULTIPROCESSORS = 7

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ with _Float16")


class CpuKernels:
    """Takes the place of `kernels.Kernels`."""

    def __init__(self, variant: Variant, directory: Path) -> None:
        for name in ("common.cuh", "instructions.cuh", "attention.cpp"):
            shutil.copy(HERE / name, directory)
        for name in ("tiles.cuh", "attention.cu", "prompt.cu"):
            shutil.copy(source_directory() / name, directory)
        macros = [f"-D{name}={value}" for name, value in variant.definitions().items()]
        library = directory / "attention.so"
        command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", *macros, "-o", str(library)]
        result = subprocess.run(
            [*command, str(directory / "attention.cpp")],
            capture_output=True,
            text=True,
            check=False,
        )
        if "_Float16" in result.stderr:
            pytest.skip("this g++ has no _Float16")
        assert result.returncode == 0, result.stderr
        self._library = ctypes.CDLL(str(library))

    def launch(self, name, grid, block, arguments, *, shared_bytes=0, overlapping=False):
        held = [kind(value) for value, kind in arguments]
        addresses = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        result = self._library.run_kernel(
            name.encode(), (ctypes.c_uint * 3)(*grid), block[0], addresses, shared_bytes
        )
        assert result == 0, name


class CpuArray:
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.pointer, self.nbytes = array, array.ctypes.data, array.nbytes


class Cpu:
    """Takes the place of `Device` and `DeviceArrays`."""

    multiprocessors = MULTIPROCESSORS

    def empty(self, shape, dtype):
        return CpuArray(np.full(shape, 127, dtype))

    def clear(self, pointer, size):
        ctypes.memset(pointer, 0, size)


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request, tmp_path_factory):
    variant = VARIANTS[request.param]
    return variant, CpuKernels(variant, tmp_path_factory.mktemp(request.param))


def run(compiled, example, sequences, tokens, *, prompt=False):
    variant, kernels = compiled
    attention = Attention(kernels, variant.geometry, MULTIPROCESSORS)
    arrays = {name: array.copy() for name, array in example.arrays().items()}
    operands = example.operands({name: array.ctypes.data for name, array in arrays.items()})
    if prompt:
        attention.prompt(operands, tokens)
    else:
        scratch = Scratch(Cpu(), Cpu(), variant.geometry, sequences * tokens)
        for _ in range(2):  # the second finds what the first has left
            attention.step(operands, scratch, sequences, tokens)
    tolerance = ATTENTION_FP16_RELATIVE if variant.half else ATTENTION_FP32_RELATIVE
    example.check(arrays["out"], arrays["keys"], arrays["values"], tolerance)


@pytest.mark.parametrize("pasts", [[0], [15], [300], [5, 130, 64]])
def test_one_token_of_each_sequence(compiled, rng, pasts):
    example = Example(compiled[0], rng, pasts, 1, capacity=320)
    run(compiled, example, len(pasts), 1)


@pytest.mark.parametrize(("past", "tokens"), [(0, 2), (150, 9)])
def test_a_few_tokens_of_one_sequence(compiled, rng, past, tokens):
    example = Example(compiled[0], rng, [past], tokens, capacity=180)
    run(compiled, example, 1, tokens)


@pytest.mark.parametrize(("past", "tokens"), [(0, 70), (37, 33)])
def test_a_prompt(compiled, rng, past, tokens):
    example = Example(compiled[0], rng, [past], tokens, capacity=100)
    run(compiled, example, 1, tokens, prompt=True)
