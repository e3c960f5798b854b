"""The kernels for a step's products against float64; neither TensorRT nor cases are needed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from elements import DTYPES, macros
from tolerances import BLOCK_BF16_RELATIVE, BLOCK_FP16_RELATIVE, BLOCK_FP32_RELATIVE

from ojfa_export.models.precision import Precision

pytestmark = pytest.mark.gpu
TOLERANCES = {
    "fp32": BLOCK_FP32_RELATIVE,
    "fp16": BLOCK_FP16_RELATIVE,
    "bf16": BLOCK_BF16_RELATIVE,
}
EPSILON = 1e-5
# Less than one load of every lane, not whole steps of loads, several of them; fewer outputs than a
# warp takes, an odd number, more than all warps take at once; inputs of 16 tokens that don't find
# room in shared memory together.
SIZES = [(32, 1), (200, 7), (1600, 513), (4096, 12_289), (11_008, 4096)]
TOKENS = (1, 2, 5, 16, 40, 300)


class Compiled:
    """The kernels for one kind of model."""

    def __init__(self, precision: Precision, *, layer: bool, gated: bool) -> None:
        from ojfa_export.backends.cuda.arrays import DTYPES as backend_dtypes
        from ojfa_export.backends.cuda.arrays import DeviceArrays
        from ojfa_export.backends.cuda.device import the_device
        from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels
        from ojfa_export.backends.tensorrt.linear import LinearKernels

        self.half, self.layer, self.gated = precision != "fp32", layer, gated
        self.element, self.tolerance = np.dtype(DTYPES[precision]), TOLERANCES[precision]
        # As the backend has it, which knows bf16 by its bits.
        self.stored = backend_dtypes[precision]
        device = the_device()
        device.make_current()
        defined = {
            **macros(precision),
            "HEAD_DIM": 16,
            "HEADS": 1,
            "KV_HEADS": 1,
            "ROTARY_DIM": 0,
            "WINDOW": 0,
            "NORM_LAYER": int(layer),
            "ACTIVATION": 0,
            "GATED": int(gated),
        }
        self.arrays = DeviceArrays(device)
        kernels = Kernels(device, compile_kernels(defined, device.compute_capability))
        self.linear = LinearKernels(device, kernels, self.element.itemsize)
        self.kernels, self.device = kernels, device

    def products(self, tokens, columns):
        """The kernels for so many tokens, or the library."""
        from ojfa_export.backends.cuda.cublas import Cublas
        from ojfa_export.backends.tensorrt.gemm import GemmProducts
        from ojfa_export.backends.tensorrt.linear import MOST_TOKENS
        from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS

        if tokens <= MOST_TOKENS:
            return self.linear
        if not self.half or tokens > MOST_TILED_TOKENS:
            return GemmProducts(Cublas(self.device), self.arrays, self.kernels, self.stored)
        return self.tiled(columns)

    def tiled(self, hidden_size):
        """The kernels on tensor cores, of which there are none in fp32."""
        from ojfa_export.backends.tensorrt.narrow import on_tensor_cores

        if not self.half:
            pytest.skip("16 bits alone")
        return on_tensor_cores(self.device, self.arrays, self.kernels, self.stored, hidden_size)

    def normed(self, hidden, weight, bias):
        """The norm in float64."""
        mean = hidden.mean(axis=1, keepdims=True) if self.layer else 0.0
        variance = ((hidden - mean) ** 2).mean(axis=1, keepdims=True)
        return (hidden - mean) / np.sqrt(variance + EPSILON) * weight + bias

    def check(self, actual, expected):
        """Compares results whose terms are of size 1 together, though they may cancel."""
        scale = max(1.0, np.abs(expected).max())
        found = np.asarray(actual)
        found = found.view(self.element) if found.dtype == self.stored else found
        np.testing.assert_allclose(
            found.astype(np.float64), expected, atol=self.tolerance * scale, rtol=0
        )

    def hold(self, array):
        """An array on the device."""
        stored = array.view(self.stored) if array.dtype == self.element else array
        return self.arrays.asarray(stored)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=pytest.mark.xdist_group(f"gpu-linear-{kind}"))
        for kind in ("fp16-rms-gated", "fp16-layer", "fp32-layer", "bf16-rms-gated")
    ],
)
def compiled(request):
    precision, _, kind = request.param.partition("-")
    return Compiled(precision, layer="layer" in kind, gated="gated" in kind)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("columns", "outputs"), SIZES)
def test_products(compiled, rng, tokens, columns, outputs):
    """With and without norm, bias and residual."""
    check_products(compiled, rng, compiled.products(tokens, columns), tokens, columns, outputs)


SMALL = [(32, 1), (64, 100), (576, 1537), (1000, 70), (1024, 513)]


@pytest.mark.parametrize("tokens", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("columns", "outputs"), SMALL)
def test_products_of_a_small_model(compiled, rng, tokens, columns, outputs):
    """In the matrix-vector kernels, which a benchmark may ask for."""
    check_products(compiled, rng, compiled.linear, tokens, columns, outputs)


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize(("columns", "outputs"), SMALL)
def test_tiled_products_of_a_small_model(compiled, rng, tokens, columns, outputs):
    """With the norm in the kernels."""
    check_products(compiled, rng, compiled.tiled(columns), tokens, columns, outputs)


@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_the_head_of_a_small_model(compiled, rng, tokens):
    """More tiles than are on their way at once, with two thread blocks on a multiprocessor."""
    check_products(compiled, rng, compiled.tiled(576), tokens, 576, 49_152)


def check_products(compiled, rng, products, tokens, columns, outputs):
    from ojfa_export.backends.tensorrt.linear import Norm

    arrays, exact = compiled.arrays, np.float64
    matrix = (rng.standard_normal((outputs, columns)) / math.sqrt(columns)).astype(compiled.element)
    x = rng.standard_normal((tokens, columns)).astype(compiled.element)
    residual, bias, hidden, weight, shift = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((tokens, outputs), outputs, (tokens, columns), columns, columns)
    )
    held = [compiled.hold(each) for each in (matrix, x, residual, bias, hidden, weight, shift)]
    out = arrays.empty((tokens, outputs), np.float32)
    product = x.astype(exact) @ matrix.astype(exact).T
    products.linear(out, held[2], held[1], held[0], held[3])
    compiled.check(out, product + residual + bias)
    products.linear(held[2], held[2], held[1], held[0], None)
    compiled.check(held[2], product + residual)
    normed = compiled.normed(hidden.astype(exact), weight, shift) @ matrix.astype(exact).T
    norm = Norm(held[5], held[6], EPSILON)
    products.norm_linear(out, held[4], norm, held[0], held[3])
    compiled.check(out, normed + bias)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("columns", "width"), SIZES)
def test_activated_products(compiled, rng, tokens, columns, width):
    check_activated(compiled, rng, compiled.products(tokens, columns), tokens, columns, width)


@pytest.mark.parametrize("tokens", [1, 4, 8, 9, 16])
@pytest.mark.parametrize(("columns", "outputs"), [(1536, 576), (4096, 1000)])
def test_a_small_model_s_products_of_many_columns(compiled, rng, tokens, columns, outputs):
    """What comes of an MLP, whose inputs need no norm."""
    products = compiled.tiled(576)
    matrix = (rng.standard_normal((outputs, columns)) / math.sqrt(columns)).astype(compiled.element)
    x = rng.standard_normal((tokens, columns)).astype(compiled.element)
    residual, bias = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, outputs), outputs)
    )
    held = [compiled.hold(each) for each in (matrix, x, residual, bias)]
    products.linear(held[2], held[2], held[1], held[0], held[3])
    expected = x.astype(np.float64) @ matrix.astype(np.float64).T
    compiled.check(held[2], expected + residual + bias)


@pytest.mark.parametrize("tokens", range(1, 17))
@pytest.mark.parametrize(("columns", "width"), SMALL)
def test_activated_tiled_products_of_a_small_model(compiled, rng, tokens, columns, width):
    check_activated(compiled, rng, compiled.tiled(columns), tokens, columns, width)


@pytest.mark.parametrize(("columns", "outputs"), [(576, 960), (1000, 332), (1536, 576)])
def test_tokens_get_the_same_however_many_there_are(compiled, rng, columns, outputs):
    """Bit by bit, in a small model's kernels on tensor cores."""
    from ojfa_export.backends.tensorrt.linear import Norm

    products, arrays, most = compiled.tiled(576), compiled.arrays, 16
    matrix = (rng.standard_normal((outputs, columns)) / math.sqrt(columns)).astype(compiled.element)
    x = rng.standard_normal((most, columns)).astype(compiled.element)
    hidden, weight = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((most, columns), columns)
    )
    matrix, x, hidden, weight = map(compiled.hold, (matrix, x, hidden, weight))
    norm, width = Norm(weight, None, EPSILON), outputs // (2 if compiled.gated else 1)
    found = []
    for tokens in range(1, most + 1):
        out = arrays.empty((tokens, outputs), np.float32)
        inner = arrays.empty((tokens, width), compiled.stored)
        products.linear(out, None, x[:tokens], matrix, None)
        results = [np.asarray(out)]
        if columns <= 1024:
            products.norm_linear(out, hidden[:tokens], norm, matrix, None)
            products.norm_up(inner, hidden[:tokens], norm, matrix, None)
            results += [np.asarray(out), np.asarray(inner)]
        found.append(results)
    for some in found:
        for one, every in zip(some, found[-1], strict=True):
            np.testing.assert_array_equal(one, every[: len(one)])


@pytest.mark.parametrize("tokens", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("columns", "width"), [(32, 1), (576, 1537), (1024, 513)])
def test_activated_products_of_a_small_model(compiled, rng, tokens, columns, width):
    check_activated(compiled, rng, compiled.linear, tokens, columns, width)


def check_activated(compiled, rng, products, tokens, columns, width):
    from ojfa_export.backends.tensorrt.linear import Norm

    arrays, exact = compiled.arrays, np.float64
    outputs = width * (2 if compiled.gated else 1)
    matrix = (rng.standard_normal((outputs, columns)) / math.sqrt(columns)).astype(compiled.element)
    hidden, weight, bias, shift = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((tokens, columns), columns, outputs, columns)
    )
    held = [compiled.hold(each) for each in (matrix, hidden, weight, bias, shift)]
    inner = arrays.empty((tokens, width), compiled.stored)
    norm = Norm(held[2], held[4], EPSILON)
    products.norm_up(inner, held[1], norm, held[0], held[3])
    y = compiled.normed(hidden.astype(exact), weight, shift) @ matrix.astype(exact).T + bias
    gate = y[:, :width]
    expected = gate / (1 + np.exp(-gate))
    if compiled.gated:
        expected = expected * y[:, width:]
    compiled.check(inner, expected)
