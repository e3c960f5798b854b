"""The attention kernels against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
from attention_cases import VARIANTS, Example, Variant
from kernels_on_cpu import CpuKernels

from ojfa_export.backends.cuda.sources import source_directory
from ojfa_export.backends.tensorrt.attention import (
    STEP_QUERIES,
    Attention,
    Chunks,
    Scratch,
    step_launch,
)

SOURCES = ("float8.cuh", "tiles.cuh", "words.cuh", "attention.cu", "prompt.cu")
MULTIPROCESSORS = 7
HALF_CALLED_OFF = 2  # as in cuda_on_cpu
# What the matrix-vector product leaves of a multiprocessor of compute capability 9.0: its 512
# threads have 104 registers each, and 40 KiB of shared memory at Llama-2-7B's shape.
FREE_REGISTERS, FREE_SHARED_BYTES = (64 << 10) - 512 * 104, (228 - 2 - 41) << 10


class CpuArray:
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.pointer, self.nbytes = array, array.ctypes.data, array.nbytes


class Cpu:
    """Takes the place of `Device` and `DeviceArrays`."""

    multiprocessors = MULTIPROCESSORS

    def lasting(self, shape, dtype):
        return CpuArray(np.full(shape, 127, dtype))

    def clear(self, pointer, size):
        ctypes.memset(pointer, 0, size)


# Those that another covers are left to the GPU (tests/gpu/test_gpu_attention.py). A variant's tests
# stay in one process, which compiles it.
HERE_TOO = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"attention-{name}"))
    for name in sorted(set(VARIANTS) - {"mha", "fp32", "small-head", "bf16"})
]


@pytest.fixture(scope="module", params=HERE_TOO)
def compiled(request, tmp_path_factory):
    variant, directory = VARIANTS[request.param], tmp_path_factory.mktemp(request.param)
    return variant, CpuKernels("attention.cpp", SOURCES, variant.definitions(), directory)


def run(compiled, example, launches, *, as_prompt=(), most_new=1, multiprocessors=MULTIPROCESSORS):
    """Runs sequences of an example in some launches, and compares; returns what they attended."""
    variant, kernels = compiled
    attention = Attention(kernels, variant.geometry, multiprocessors, most_new)
    arrays = {name: array.copy() for name, array in example.arrays().items()}
    operands = example.operands({name: array.ctypes.data for name, array in arrays.items()})
    cpu = Cpu()
    cpu.multiprocessors = multiprocessors
    scratch = Scratch(cpu, cpu, variant.geometry, len(example.qkv))
    called_off = ctypes.c_int.in_dll(kernels.library, "called_off")
    for off in (0, HALF_CALLED_OFF, 0):  # each finds what the one before has left
        called_off.value = off
        if max(example.chunks) > most_new:
            attention.append(operands, len(example.qkv))
        for index, which in enumerate(launches):
            listed = example.chunk_list(which)
            longest = max(example.chunks[each] for each in which)
            alike = len(set(example.chunks)) == len(launches) == 1
            chunks = Chunks(len(which), longest, 0 if alike else listed.ctypes.data)
            if index in as_prompt:
                attention.prompt(operands, chunks)
            else:
                attention.step(operands, scratch, chunks)
    assert not scratch.finished.array.any()
    example.check(arrays["out"], arrays["keys"], arrays["values"])
    return arrays["out"]


@pytest.mark.parametrize("pasts", [[0], [15], [300], [5, 130, 64]])
def test_one_token_of_each_sequence(compiled, rng, pasts):
    example = Example(compiled[0], rng, pasts, 1, capacity=320)
    run(compiled, example, [range(len(pasts))])


@pytest.mark.parametrize(("past", "tokens"), [(0, 2), (150, 9)])
def test_a_few_tokens_of_one_sequence(compiled, rng, past, tokens):
    example = Example(compiled[0], rng, [past], tokens, capacity=180)
    run(compiled, example, [[0]])


@pytest.mark.parametrize(("past", "tokens"), [(0, 40), (37, 33)])
def test_a_prompt(compiled, rng, past, tokens):
    example = Example(compiled[0], rng, [past], tokens, capacity=100)
    run(compiled, example, [[0]], as_prompt=[0])


# Nothing before them; over the end of a page and of a thread block's keys, in a tile and between
# tiles of queries; more than a window.
@pytest.mark.parametrize(("past", "tokens"), [(0, 5), (188, 8), (189, 4), (60, 7)])
def test_tokens_that_attention_appends(compiled, rng, past, tokens):
    example = Example(compiled[0], rng, [past], tokens, capacity=200)
    most = 2 * compiled[0].geometry.kv_heads - 1  # of which wide thread blocks leave half
    run(compiled, example, [[0]], most_new=STEP_QUERIES, multiprocessors=most)


@pytest.mark.parametrize(("past", "tokens"), [(0, 8), (124, 7), (255, 2), (1100, 5)])
def test_tokens_that_wide_thread_blocks_append(compiled, rng, past, tokens):
    """Some with more keys each than the least."""
    example = Example(compiled[0], rng, [past], tokens, capacity=past + 8)
    run(compiled, example, [[0]], most_new=STEP_QUERIES, multiprocessors=90)


@pytest.mark.parametrize("multiprocessors", [8, 90])
def test_chunks_that_attention_appends(compiled, rng, multiprocessors):
    pasts, chunks = [190, 0, 62, 17], [4, 8, 1, 3]
    example = Example(compiled[0], rng, pasts, 0, capacity=200, chunks=chunks)
    run(compiled, example, [range(4)], most_new=STEP_QUERIES, multiprocessors=multiprocessors)


def test_few_heads_are_attended_to_by_wide_thread_blocks(compiled):
    geometry = compiled[0].geometry
    for tokens in (1, STEP_QUERIES):
        enough = 2 * geometry.kv_heads * 3
        for multiprocessors, kernel in ((enough, "wide_attention"), (enough - 1, "attention")):
            assert step_launch(geometry, Chunks(3, tokens), multiprocessors, 8).kernel == kernel
    assert step_launch(geometry, Chunks(1, 1), 1000).kernel == "attention"


def test_tokens_get_the_same_however_many_are_beside_them(compiled, rng):
    """Bit by bit, as long as no thread block takes more keys than the splits are made for."""
    variant, kernels = compiled
    past, tokens = 379, 8
    example = Example(variant, rng, [past], tokens, capacity=520)
    attention = Attention(kernels, variant.geometry, 200, STEP_QUERIES)
    cpu = Cpu()
    cpu.multiprocessors = 200
    outs = []
    for each in (tokens, 1, 3):
        arrays = {name: array.copy() for name, array in example.arrays().items()}
        for first in range(0, tokens, each):
            count = min(each, tokens - first)
            part = dict(arrays)
            for name in ("out", "qkv", "positions", "sequences"):
                part[name] = arrays[name][first : first + count]
            operands = example.operands({name: array.ctypes.data for name, array in part.items()})
            scratch = Scratch(cpu, cpu, variant.geometry, count)
            attention.run(operands, scratch, count, (Chunks(1, count),))
        outs.append([arrays[name].view(np.uint8) for name in ("out", "keys", "values")])
    for some in outs[1:]:
        for one, other in zip(some, outs[0], strict=True):
            np.testing.assert_array_equal(one, other)


def test_chunks_of_any_length_in_one_pass(compiled, rng):
    pasts, chunks = [70, 0, 200, 31, 64], [1, 37, 3, 20, 1]
    example = Example(compiled[0], rng, pasts, 0, capacity=230, chunks=chunks)
    run(compiled, example, [[0, 2, 4], [1, 3]], as_prompt=[1])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "variant",
    [
        Variant(32, 8, 128, 128, 0),
        Variant(32, 8, 128, 128, 0, "bf16"),
        Variant(8, 1, 256, 256, 64, "fp32"),
        Variant(32, 8, 128, 128, 0, fp8_cache=True),
        Variant(32, 8, 128, 128, 0, "bf16", fp8_cache=True),
    ],
    ids=["fp16", "bf16", "fp32-wide-head", "fp8-cache", "fp8-cache-bf16"],
)
def test_nothing_is_spilled(variant, architecture, tmp_path):
    """And a step's thread block finds room beside the matrix-vector product before it."""
    if variant.fp8_cache and architecture == "sm_80":
        pytest.skip("has no instruction that widens 8-bit floats")
    macros = [f"-D{name}={value}" for name, value in variant.definitions().items()]
    for source in ("attention.cu", "prompt.cu"):
        command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        command += [*macros, "-o", str(tmp_path / "out.cubin"), str(source_directory() / source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr
        spilled = re.findall(r"(\d+) bytes spill stores", result.stderr)
        assert spilled
        assert not any(map(int, spilled)), result.stderr
        if source == "attention.cu" and variant.precision != "fp32":
            [registers] = re.findall(r"'attention'.*?Used (\d+) registers", result.stderr, re.S)
            launch = step_launch(variant.geometry, Chunks(1, 1), MULTIPROCESSORS)
            assert int(registers) * launch.threads <= FREE_REGISTERS
            assert launch.shared_bytes <= FREE_SHARED_BYTES
