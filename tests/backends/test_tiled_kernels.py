"""Products of a few tokens against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from tolerances import BLOCK_FP16_RELATIVE

SOURCES = ("activation.cuh", "around_products.cu", "tiled_linear.cu")
EPSILON = 1e-5
MULTIPROCESSORS = 3
SHARED_BYTES = 227 << 10


@dataclass
class Kind:
    """Of model: what its MLP and its norms are."""

    layer: bool
    gated: bool

    def macros(self):
        return {"NORM_LAYER": self.layer, "GATED": self.gated, "ACTIVATION": 0, "HALF": True}

    def normed(self, hidden, weight, shift):
        """In float64, rounded as the products take it."""
        hidden = hidden.astype(np.float64)
        if self.layer:
            hidden = hidden - hidden.mean(axis=1, keepdims=True)
        scale = np.sqrt((hidden**2).mean(axis=1, keepdims=True) + EPSILON)
        return (hidden / scale * weight + shift).astype(np.float16).astype(np.float64)


KINDS = {"rms-gated": Kind(layer=False, gated=True), "layer": Kind(layer=True, gated=False)}


class CpuArray:
    """Takes the place of a `DeviceArray`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.pointer = array, array.shape, array.ctypes.data
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice) -> CpuArray:
        return CpuArray(self.array[rows])


class Cpu:
    """Takes the place of `Device` and `DeviceArrays`."""

    multiprocessors, shared_bytes = MULTIPROCESSORS, SHARED_BYTES

    def lasting(self, shape, dtype):
        return CpuArray(np.full(shape, np.nan, dtype))

    empty = lasting

    def multiply(self, out, x, matrix, bias=None, added=None):
        """Takes the place of `Cublas`."""
        y = x.array.astype(np.float64) @ matrix.array.astype(np.float64).T
        y = y if bias is None else y + bias.array
        out.array[...] = y if added is None else y + added.array


@pytest.fixture(scope="module", params=KINDS)
def compiled(request, driver, tmp_path_factory):
    kind = KINDS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return kind, CpuKernels("tiled.cpp", SOURCES, kind.macros(), directory)


def arrays(rng, *shapes):
    return [CpuArray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def halves(rng, scale, *shape):
    return CpuArray((scale * rng.standard_normal(shape)).astype(np.float16))


def check(actual, expected):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=BLOCK_FP16_RELATIVE * scale, rtol=0)


def launched(kernels, monkeypatch):
    """Names of the kernels that are launched from now on."""
    names, launch = [], kernels.launch

    def noting(name, *arguments, **options):
        names.append(name)
        launch(name, *arguments, **options)

    monkeypatch.setattr(kernels, "launch", noting)
    return names


# A part of a span, several rounds of the warps; fewer rows than a tile, tiles of several turns;
# inputs that don't find room at once. Up to 1024 columns the norm is in the product.
@pytest.mark.parametrize(
    ("tokens", "columns", "outputs"),
    [
        *[(3, 24, 7), (8, 1048, 40), (9, 40, 16), (16, 4200, 50), (16, 11_008, 36)],
        *[(1, 576, 150), (2, 64, 100), (16, 1000, 20), (9, 1024, 33), (1, 1024, 16)],
    ],
)
def test_products(compiled, rng, tokens, columns, outputs):
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import TiledKernels

    kind, kernels = compiled
    tiled = TiledKernels(Cpu(), Cpu(), kernels, columns)
    matrix = halves(rng, 1 / math.sqrt(columns), outputs, columns)
    x = halves(rng, 1.0, tokens, columns)
    hidden, residual, bias, weight, shift = arrays(
        rng, (tokens, columns), (tokens, outputs), (outputs,), (columns,), (columns,)
    )
    exact = matrix.array.astype(np.float64).T
    out = CpuArray(np.full((tokens, outputs), np.nan, np.float32))
    tiled.norm_linear(out, hidden, Norm(weight, shift, EPSILON), matrix, None)
    check(out.array, kind.normed(hidden.array, weight.array, shift.array) @ exact)
    tiled.norm_linear(out, hidden, Norm(weight, None, EPSILON), matrix, bias)
    check(out.array, kind.normed(hidden.array, weight.array, 0.0) @ exact + bias.array)
    expected = residual.array + x.array.astype(np.float64) @ exact
    tiled.linear(out, residual, x, matrix, bias)
    check(out.array, expected + bias.array)
    tiled.linear(residual, residual, x, matrix, None)
    check(residual.array, expected)


@pytest.mark.parametrize(
    ("tokens", "columns", "width"),
    [
        *[(4, 72, 5), (13, 520, 70), (20, 72, 5), (300, 40, 2056), (2, 1048, 9)],
        *[(1, 576, 75), (7, 1000, 17), (16, 64, 10), (10, 1024, 30)],
    ],
)
def test_activated_products(compiled, rng, tokens, columns, width):
    """By the kernels for a few tokens, and by those around a library's products."""
    from ojfa_export.backends.tensorrt.gemm import GemmProducts
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS, TiledKernels

    kind, kernels = compiled
    if tokens <= MOST_TILED_TOKENS:
        products = TiledKernels(Cpu(), Cpu(), kernels, columns)
    else:
        products = GemmProducts(Cpu(), Cpu(), kernels, np.dtype(np.float16))
    outputs = width * (2 if kind.gated else 1)
    matrix = halves(rng, 1 / math.sqrt(columns), outputs, columns)
    hidden, bias, weight, shift = arrays(rng, (tokens, columns), (outputs,), (columns,), (columns,))
    inner = CpuArray(np.full((tokens, width), np.nan, np.float16))
    products.norm_up(inner, hidden, Norm(weight, shift, EPSILON), matrix, bias)
    y = kind.normed(hidden.array, weight.array, shift.array) @ matrix.array.astype(np.float64).T
    y = y + bias.array
    expected = y[:, :width] / (1 + np.exp(-y[:, :width]))
    check(inner.array, expected * y[:, width:] if kind.gated else expected)


@pytest.mark.parametrize("columns", [72, 1048])
def test_a_small_model_needs_no_kernel_for_norms(compiled, rng, monkeypatch, columns):
    """Where that finds room; and what it gives is what the norm by itself and the product give."""
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import TiledKernels

    kernels = compiled[1]
    names = launched(kernels, monkeypatch)
    matrix = halves(rng, 1 / math.sqrt(columns), 20, columns)
    hidden, weight = arrays(rng, (5, columns), (columns,))
    outs = [CpuArray(np.full((5, 20), np.nan, np.float32)) for _ in range(2)]
    TiledKernels(Cpu(), Cpu(), kernels, columns).norm_linear(
        outs[0], hidden, Norm(weight, None, EPSILON), matrix, None
    )
    small = columns <= 1024
    assert names == (["norm_tiled_linear_8"] if small else ["normalize", "tiled_linear_8"])
    if not small:
        return
    monkeypatch.setattr("ojfa_export.backends.tensorrt.tiled.SMALL_WIDTH", 0)
    TiledKernels(Cpu(), Cpu(), kernels, columns).norm_linear(
        outs[1], hidden, Norm(weight, None, EPSILON), matrix, None
    )
    assert names[1:] == ["normalize", "tiled_linear_8"]
    check(outs[0].array, outs[1].array)


def test_tokens_get_the_same_however_many_there_are(compiled, rng):
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import TiledKernels

    kind, kernels = compiled
    columns, width, most = 1000, 18, 16
    tiled = TiledKernels(Cpu(), Cpu(), kernels, columns)
    matrix = halves(rng, 1 / math.sqrt(columns), width * 2, columns)
    x = halves(rng, 1.0, most, columns)
    hidden, weight = arrays(rng, (most, columns), (columns,))
    norm = Norm(weight, None, EPSILON)
    found = []
    for tokens in (most, 1, 4, 8):
        out, plain = (CpuArray(np.full((tokens, 2 * width), np.nan, np.float32)) for _ in range(2))
        inner = CpuArray(np.full((tokens, width if kind.gated else 2 * width), np.nan, np.float16))
        tiled.norm_linear(out, hidden[:tokens], norm, matrix, None)
        tiled.linear(plain, None, x[:tokens], matrix, None)
        tiled.norm_up(inner, hidden[:tokens], norm, matrix, None)
        found.append([each.array for each in (out, plain, inner)])
    for some in found[1:]:
        for one, every in zip(some, found[0], strict=True):
            np.testing.assert_array_equal(one, every[: len(one)])


def test_products_that_are_called_off(compiled, rng):
    """They write nothing."""
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import TiledKernels

    _, kernels = compiled
    tiled = TiledKernels(Cpu(), Cpu(), kernels, 64)
    matrix = halves(rng, 0.1, 20, 64)
    hidden, weight, out = arrays(rng, (2, 64), (64,), (2, 20))
    before = out.array.copy()
    called_off = ctypes.c_int.in_dll(kernels.library, "called_off")
    called_off.value = 1
    try:
        tiled.norm_linear(out, hidden, Norm(weight, None, EPSILON), matrix, None)
        tiled.linear(out, None, halves(rng, 1.0, 2, 64), matrix, None)
    finally:
        called_off.value = 0
    np.testing.assert_array_equal(out.array, before)


def test_what_finds_room(driver):
    """Of Llama-2-7B's shape all tokens on an H200; inputs of 11,008 columns in parts."""
    from ojfa_export.backends.tensorrt.tiled import most_tokens, spans_of_a_pass

    shapes = [(12_288, 4096), (4096, 4096), (22_016, 4096), (4096, 11_008), (32_000, 4096)]
    assert most_tokens(shapes, 132, 227 << 10) == 16
    assert spans_of_a_pass(8, 4096, 11_008, 132, 227 << 10) == 172
    assert spans_of_a_pass(16, 4096, 11_008, 132, 227 << 10) == 64
    # Fewer where a thread block has less, none where it has nothing.
    assert 2 < most_tokens(shapes, 84, 99 << 10) < 16
    assert most_tokens(shapes, 132, 8 << 10) == 0
