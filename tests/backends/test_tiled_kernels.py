"""Products of a few tokens against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

import numpy as np
import pytest
from elements import DTYPES, macros
from kernels_on_cpu import CpuKernels
from tolerances import BLOCK_BF16_RELATIVE, BLOCK_FP16_RELATIVE

from ojfa_export.backends.cuda.sources import source_directory
from ojfa_export.models.precision import Precision

SOURCES = (
    *("activation.cuh", "staging.cuh"),
    *("around_products.cu", "narrow_linear.cu", "tiled_linear.cu"),
)
EPSILON = 1e-5
MULTIPROCESSORS = 3
SHARED_BYTES = 227 << 10


@dataclass
class Kind:
    """Of model: what its MLP and its norms are."""

    layer: bool
    gated: bool
    precision: Precision = "fp16"

    @property
    def dtype(self):
        return DTYPES[self.precision]

    def macros(self):
        kind = {"NORM_LAYER": self.layer, "GATED": self.gated, "ACTIVATION": 0, "SMALL": 1}
        return kind | macros(self.precision)

    def numbers(self, rng, scale, *shape):
        """Random ones as matrices and inputs of products are stored."""
        return CpuArray((scale * rng.standard_normal(shape)).astype(self.dtype))

    def check(self, actual, expected):
        scale = max(1.0, np.abs(expected.astype(np.float64)).max())
        relative = {"fp16": BLOCK_FP16_RELATIVE, "bf16": BLOCK_BF16_RELATIVE}[self.precision]
        actual = actual.astype(np.float64)
        np.testing.assert_allclose(actual, expected, atol=relative * scale, rtol=0)

    def normed(self, hidden, weight, shift):
        """In float64, rounded as the products take it."""
        hidden = hidden.astype(np.float64)
        if self.layer:
            hidden = hidden - hidden.mean(axis=1, keepdims=True)
        scale = np.sqrt((hidden**2).mean(axis=1, keepdims=True) + EPSILON)
        return (hidden / scale * weight + shift).astype(self.dtype).astype(np.float64)


KINDS = {
    "rms-gated": Kind(layer=False, gated=True),
    "layer": Kind(layer=True, gated=False),
    "bf16": Kind(layer=False, gated=True, precision="bf16"),
}


class CpuArray:
    """Takes the place of a `DeviceArray`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.pointer = array, array.shape, array.ctypes.data
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice) -> CpuArray:
        return CpuArray(self.array[rows])

    def reshape(self, *shape: int) -> CpuArray:
        """The first elements in another shape, as of a `DeviceArray`."""
        return CpuArray(self.array.reshape(-1)[: math.prod(shape)].reshape(shape))


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


def products_of(compiled, hidden_size):
    from ojfa_export.backends.tensorrt.narrow import on_tensor_cores

    kind, kernels = compiled
    return on_tensor_cores(Cpu(), Cpu(), kernels, kind.dtype, hidden_size)


def launched(kernels, monkeypatch):
    """Names of the kernels that are launched from now on."""
    names, launch = [], kernels.launch

    def noting(name, *arguments, **options):
        names.append(name)
        launch(name, *arguments, **options)

    monkeypatch.setattr(kernels, "launch", noting)
    return names


# A part of a span, several rounds of the warps; fewer rows than a tile, tiles of several turns;
# inputs that don't find room at once. Up to 1024 columns the kernels are a small model's: of one
# and two tokens, of tiles for less than all that may be on their way and for several rounds.
@pytest.mark.parametrize(
    ("tokens", "columns", "outputs"),
    [
        *[(3, 24, 7), (8, 1048, 40), (9, 40, 16), (16, 4200, 50), (16, 11_008, 36)],
        *[(1, 576, 330), (2, 64, 100), (16, 1000, 20), (9, 1024, 33), (1, 1024, 16)],
    ],
)
def test_products(compiled, rng, tokens, columns, outputs):
    from ojfa_export.backends.tensorrt.linear import Norm

    kind = compiled[0]
    tiled = products_of(compiled, columns)
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), outputs, columns)
    x = kind.numbers(rng, 1.0, tokens, columns)
    hidden, residual, bias, weight, shift = arrays(
        rng, (tokens, columns), (tokens, outputs), (outputs,), (columns,), (columns,)
    )
    exact = matrix.array.astype(np.float64).T
    out = CpuArray(np.full((tokens, outputs), np.nan, np.float32))
    tiled.norm_linear(out, hidden, Norm(weight, shift, EPSILON), matrix, None)
    kind.check(out.array, kind.normed(hidden.array, weight.array, shift.array) @ exact)
    tiled.norm_linear(out, hidden, Norm(weight, None, EPSILON), matrix, bias)
    kind.check(out.array, kind.normed(hidden.array, weight.array, 0.0) @ exact + bias.array)
    expected = residual.array + x.array.astype(np.float64) @ exact
    tiled.linear(out, residual, x, matrix, bias)
    kind.check(out.array, expected + bias.array)
    tiled.linear(residual, residual, x, matrix, None)
    kind.check(residual.array, expected)


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
    from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS

    kind, kernels = compiled
    if tokens <= MOST_TILED_TOKENS:
        products = products_of(compiled, columns)
    else:
        products = GemmProducts(Cpu(), Cpu(), kernels, np.dtype(kind.dtype))
    outputs = width * (2 if kind.gated else 1)
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), outputs, columns)
    hidden, bias, weight, shift = arrays(rng, (tokens, columns), (outputs,), (columns,), (columns,))
    inner = CpuArray(np.full((tokens, width), np.nan, kind.dtype))
    products.norm_up(inner, hidden, Norm(weight, shift, EPSILON), matrix, bias)
    y = kind.normed(hidden.array, weight.array, shift.array) @ matrix.array.astype(np.float64).T
    y = y + bias.array
    expected = y[:, :width] / (1 + np.exp(-y[:, :width]))
    kind.check(inner.array, expected * y[:, width:] if kind.gated else expected)


# More spans than warps, in one and in several rounds; tiles for one thread block or two.
@pytest.mark.parametrize(
    ("tokens", "columns", "outputs"), [(1, 1536, 20), (5, 1536, 120), (16, 4200, 40), (11, 2048, 9)]
)
def test_a_small_model_s_products_of_many_columns(
    compiled, rng, monkeypatch, tokens, columns, outputs
):
    kind, kernels = compiled
    names = launched(kernels, monkeypatch)
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), outputs, columns)
    x = kind.numbers(rng, 1.0, tokens, columns)
    residual, bias = arrays(rng, (tokens, outputs), (outputs,))
    expected = x.array.astype(np.float64) @ matrix.array.astype(np.float64).T
    expected += residual.array + bias.array
    products_of(compiled, 576).linear(residual, residual, x, matrix, bias)
    kind.check(residual.array, expected)
    assert names == [f"narrow_linear_{8 if tokens <= 8 else 16}"]


@pytest.mark.parametrize("room", [SHARED_BYTES, 30 << 10])
@pytest.mark.parametrize("columns", [72, 1000, 1048])
def test_a_small_model_needs_no_kernel_for_norms(compiled, rng, monkeypatch, columns, room):
    """Where that finds room; what it gives is what the norm by itself and the product give."""
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import TiledKernels

    monkeypatch.setattr(Cpu, "shared_bytes", room)
    kind, kernels = compiled
    names = launched(kernels, monkeypatch)
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), 20, columns)
    hidden, weight = arrays(rng, (5, columns), (columns,))
    outs = [CpuArray(np.full((5, 20), np.nan, np.float32)) for _ in range(2)]
    norm = Norm(weight, None, EPSILON)
    products_of(compiled, columns).norm_linear(outs[0], hidden, norm, matrix, None)
    if columns > 1024:
        assert names == ["normalize", "tiled_linear_8"]
    elif columns == 1000 and room < SHARED_BYTES:
        assert names == ["normalize", "narrow_linear_8"]
    else:
        assert names == ["norm_narrow_linear_8"]
    monkeypatch.setattr(Cpu, "shared_bytes", SHARED_BYTES)
    tiled = TiledKernels(Cpu(), Cpu(), kernels, kind.dtype, columns)
    tiled.norm_linear(outs[1], hidden, norm, matrix, None)
    assert names[-2:] == ["normalize", "tiled_linear_8"]
    kind.check(outs[0].array, outs[1].array)


@pytest.mark.parametrize("beside", [False, True], ids=["within the product", "before it"])
def test_a_norm_without_a_weight(compiled, rng, beside):
    """x / rms(x), whatever the model's norms are."""
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.tiled import TiledKernels

    kind, kernels = compiled
    matrix, out = kind.numbers(rng, 0.1, 20, 64), CpuArray(np.full((2, 20), np.nan, np.float32))
    [hidden] = arrays(rng, (2, 64))
    products = products_of(compiled, 64)
    if beside:
        products = TiledKernels(Cpu(), Cpu(), kernels, kind.dtype, 64)
    products.norm_linear(out, hidden, Norm(None, None, EPSILON), matrix, None)
    x = replace(kind, layer=False).normed(hidden.array, 1.0, 0.0)
    kind.check(out.array, x @ matrix.array.astype(np.float64).T)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_norm_before_the_sum(compiled, rng, in_place):
    from ojfa_export.backends.tensorrt.after import add_normed
    from ojfa_export.backends.tensorrt.linear import Norm

    residual, y, weight, out = arrays(rng, (3, 700), (3, 700), (700,), (3, 700))
    exact = y.array.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + EPSILON) * weight.array
    expected = residual.array + exact
    out = residual if in_place else out
    add_normed(compiled[1], out, residual, y, Norm(weight, None, EPSILON))
    np.testing.assert_allclose(out.array, expected, rtol=1e-5, atol=1e-5)


def test_logits_within_a_cap(compiled, rng):
    from ojfa_export.backends.tensorrt.after import cap_logits

    [logits] = arrays(rng, (3, 50_000))
    logits.nbytes = logits.array.nbytes
    expected = np.tanh(logits.array.astype(np.float64) / 2.5) * 2.5
    cap_logits(compiled[1], logits, 2.5)
    np.testing.assert_allclose(logits.array, expected, rtol=1e-5, atol=1e-6)
    cap_logits(compiled[1], logits, None)
    np.testing.assert_allclose(logits.array, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("columns", "hidden_size"), [(1000, 1000), (1536, 576), (1536, 4096)])
def test_tokens_get_the_same_however_many_there_are(compiled, rng, columns, hidden_size):
    """Bit by bit, where the inputs find room at once."""
    from ojfa_export.backends.tensorrt.linear import Norm

    kind = compiled[0]
    width, most = 18, 16
    products = products_of(compiled, hidden_size)
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), width * 2, columns)
    x = kind.numbers(rng, 1.0, most, columns)
    hidden, weight = arrays(rng, (most, columns), (columns,))
    norm = Norm(weight, None, EPSILON)
    found = []
    for tokens in (most, 1, 4, 8):
        out, plain = (CpuArray(np.full((tokens, 2 * width), np.nan, np.float32)) for _ in range(2))
        inner = CpuArray(np.full((tokens, width if kind.gated else 2 * width), np.nan, kind.dtype))
        products.linear(plain, None, x[:tokens], matrix, None)
        if columns == hidden_size:
            products.norm_linear(out, hidden[:tokens], norm, matrix, None)
            products.norm_up(inner, hidden[:tokens], norm, matrix, None)
        found.append([each.array.astype(np.float64) for each in (out, plain, inner)])
    for some in found[1:]:
        for one, every in zip(some, found[0], strict=True):
            np.testing.assert_array_equal(one, every[: len(one)])


@pytest.mark.parametrize("hidden_size", [64, 2048])
def test_products_that_are_called_off(compiled, rng, hidden_size):
    """They write nothing."""
    from ojfa_export.backends.tensorrt.linear import Norm

    kind, kernels = compiled
    products = products_of(compiled, hidden_size)
    matrix = kind.numbers(rng, 0.1, 20, 64)
    hidden, weight, out = arrays(rng, (2, 64), (64,), (2, 20))
    before = out.array.copy()
    called_off = ctypes.c_int.in_dll(kernels.library, "called_off")
    called_off.value = 1
    try:
        if hidden_size == 64:
            products.norm_linear(out, hidden, Norm(weight, None, EPSILON), matrix, None)
        products.linear(out, None, kind.numbers(rng, 1.0, 2, 64), matrix, None)
    finally:
        called_off.value = 0
    np.testing.assert_array_equal(out.array, before)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_small_model_s_weights_are_in_registers(kind, architecture, tmp_path):
    """In memory the smallest of them would take 96 bytes."""
    macros = {**KINDS[kind].macros(), "HEADS": 9, "HEAD_DIM": 64}
    defined = [f"-D{name}={int(value)}" for name, value in macros.items()]
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", *defined]
    source = source_directory() / "narrow_linear.cu"
    command += ["-o", str(tmp_path / "out.cubin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    frames = [int(each) for each in re.findall(r"(\d+) bytes stack frame", result.stderr)]
    assert len(frames) == 6
    assert max(frames) <= 32, result.stderr


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
