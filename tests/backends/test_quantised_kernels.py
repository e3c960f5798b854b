"""Products with quantised matrices against float64, run on the CPU thread by thread."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from quantised_matrices import random_matrix
from stand_in.quantised import Layout
from test_tiled_kernels import EPSILON, Cpu, CpuArray, Kind, arrays

from ojfa_export.backends.cuda.sources import weight_definitions
from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, dequantise

SOURCES = (
    *(
        "activation.cuh",
        "float8.cuh",
        "numbers.cuh",
        "quantised_products.cuh",
        "around_products.cu",
    ),
    *("quantised_linear.cu", "quantised_batch.cu", "quantised_layout.cu"),
)
WIDTH = 1024  # of hidden states at most


@dataclass
class Quantised:
    kind: Kind
    form: WeightFormat
    kernels: CpuKernels

    def matrix(self, rng, outputs: int, columns: int) -> QuantisedMatrix:
        return random_matrix(rng, self.form, outputs, columns)

    def products(self, *shape):
        from ojfa_export.backends.tensorrt.quantised import QuantisedKernels
        from ojfa_export.backends.tensorrt.quantised_room import QuantisedShape

        device, form, dtype, shapes = Device(), self.form, self.kind.dtype, [QuantisedShape(*shape)]
        return QuantisedKernels(device, device, self.kernels, form, dtype, shapes, shape[1])

    def on_device(self, matrix: QuantisedMatrix, *, paired: bool = False, order=None):
        from ojfa_export.backends.cuda.kernels import integer, pointer
        from ojfa_export.backends.tensorrt.layout import inverse, tiles_of, words_of
        from ojfa_export.backends.tensorrt.matrices import DeviceMatrix

        outputs, groups = matrix.scales.shape
        columns = groups * self.form.group_size
        words = words_of(outputs, columns, self.form, paired=paired)
        array = CpuArray(np.full((1, words), 0xDEADBEEF, np.uint32))
        stored = (matrix.packed, matrix.scales, matrix.zero_points)
        self.kernels.launch(
            "lay_out_quantised",
            (2, 1, 1),
            (256, 1, 1),
            (
                pointer(array.pointer),
                *(pointer(None if each is None else each.ctypes.data) for each in stored),
                *map(integer, (outputs, columns, tiles_of(outputs, paired=paired), int(paired))),
            ),
        )
        on_device = None if order is None else (CpuArray(order), CpuArray(inverse(order)))
        return DeviceMatrix(array, (outputs, columns), paired, *(on_device or ()))


class Device(Cpu):
    name = "a CPU"


FORMS = {
    "int4-128": ("fp16", "int4", 128, False),
    "int4-32-bf16": ("bf16", "int4", 32, True),
    "int8-64": ("fp16", "int8", 64, True),
    "int8-256-bf16": ("bf16", "int8", 256, False),
    "fp8-128": ("fp16", "fp8", 128, True),
    "fp8-32-bf16": ("bf16", "fp8", 32, False),
}


@pytest.fixture(scope="module", params=FORMS)
def compiled(request, driver, tmp_path_factory) -> Quantised:
    precision, storage, group_size, layer = FORMS[request.param]
    kind = Kind(layer=layer, gated=not layer, precision=precision)
    form = WeightFormat(storage=storage, group_size=group_size, zero_points=storage != "fp8")
    macros = {**kind.macros(), "HIDDEN_SIZE": WIDTH, "SMALL": 0}
    macros |= weight_definitions(form)
    directory = tmp_path_factory.mktemp(request.param)
    return Quantised(kind, form, CpuKernels("quantised.cpp", SOURCES, macros, directory))


@pytest.mark.parametrize(("paired", "ordered"), [(False, True), (True, False)])
def test_the_layout_is_the_stand_in_s(compiled, rng, paired, ordered):
    """And what a matrix is turned into are the numbers that it stands for, rounded once."""
    from ojfa_export.backends.cuda.kernels import integer, pointer

    columns = 3 * 256
    order = rng.permutation(columns).astype(np.int32)
    matrix = compiled.matrix(rng, 70, columns)
    found = compiled.on_device(matrix, paired=paired)
    form = compiled.form
    layout = Layout(70, columns, paired, form.bits, form.group_size, form.is_float)
    exact = dequantise(matrix, form, np.float64)
    np.testing.assert_array_equal(layout.take(found.array.array[0]), exact.astype(np.float32))
    elements = np.full((70, columns), np.nan, compiled.kind.dtype)
    compiled.kernels.launch(
        "dequantise",
        (2, 1, 1),
        (256, 1, 1),
        (
            *(pointer(elements.ctypes.data), pointer(found.array.pointer)),
            pointer(order.ctypes.data if ordered else None),
            *map(integer, (70, columns, found.tiles, int(paired))),
        ),
    )
    elements = elements[:, order] if ordered else elements
    np.testing.assert_array_equal(elements, exact.astype(elements.dtype))


# Fewer steps than warps, tiles of several batches, a last tile that isn't whole, more tokens than a
# kernel takes at once, and an order of their own.
@pytest.mark.parametrize(
    ("tokens", "columns", "outputs", "ordered"),
    [
        *[(1, 256, 7, False), (1, 1024, 870, True), (2, 768, 330, False), (3, 512, 40, True)],
        *[(8, 2048, 100, False), (16, 1024, 70, False), (21, 512, 33, True), (35, 512, 70, False)],
        (13, 11_008, 40, True),
    ],
)
def test_products(compiled, rng, tokens, columns, outputs, ordered):
    from ojfa_export.backends.tensorrt.linear import Norm

    kind, matrix = compiled.kind, compiled.matrix(rng, outputs, columns)
    order = rng.permutation(columns).astype(np.int32) if ordered else None
    products = compiled.products(outputs, columns, False)
    on_device = compiled.on_device(matrix, order=order)
    exact = dequantise(matrix._replace(order=order), compiled.form, np.float64).T
    x = kind.numbers(rng, 1.0, tokens, columns)
    hidden, residual, bias, weight, shift = arrays(
        rng, (tokens, columns), (tokens, outputs), (outputs,), (columns,), (columns,)
    )
    expected = residual.array + x.array.astype(np.float64) @ exact
    products.linear(residual, residual, x, on_device, bias)
    # But for the sums in fp32 nothing is rounded.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(residual.array, expected + bias.array, atol=1e-5 * scale, rtol=0)
    if columns <= WIDTH:
        out = CpuArray(np.full((tokens, outputs), np.nan, np.float32))
        products.norm_linear(out, hidden, Norm(weight, shift, EPSILON), on_device, None)
        kind.check(out.array, kind.normed(hidden.array, weight.array, shift.array) @ exact)


@pytest.mark.parametrize(("tokens", "width"), [(1, 300), (2, 20), (5, 75), (16, 40)])
def test_activated_products(compiled, rng, tokens, width):
    from ojfa_export.backends.tensorrt.linear import Norm

    kind, columns = compiled.kind, 512
    outputs = width * (2 if kind.gated else 1)
    matrix = compiled.matrix(rng, outputs, columns)
    products = compiled.products(outputs, columns, kind.gated)
    hidden, bias, weight = arrays(rng, (tokens, columns), (outputs,), (columns,))
    inner = CpuArray(np.full((tokens, width), np.nan, kind.dtype))
    norm, on_device = Norm(weight, None, EPSILON), compiled.on_device(matrix, paired=kind.gated)
    products.norm_up(inner, hidden, norm, on_device, bias)
    y = kind.normed(hidden.array, weight.array, 0.0)
    y = y @ dequantise(matrix, compiled.form, np.float64).T + bias.array
    expected = y[:, :width] / (1 + np.exp(-y[:, :width]))
    kind.check(inner.array, expected * y[:, width:] if kind.gated else expected)


@pytest.mark.parametrize("tokens", [1, 8])
def test_products_that_are_called_off(compiled, rng, tokens):
    """They write nothing."""
    matrix = compiled.on_device(compiled.matrix(rng, 40, 512))
    products = compiled.products(40, 512, False)
    [out] = arrays(rng, (tokens, 40))
    before = out.array.copy()
    called_off = ctypes.c_int.in_dll(compiled.kernels.library, "called_off")
    called_off.value = 1
    try:
        products.linear(out, None, compiled.kind.numbers(rng, 1.0, tokens, 512), matrix, None)
    finally:
        called_off.value = 0
    np.testing.assert_array_equal(out.array, before)


def test_what_finds_room(driver):
    """Of Llama-2-7B's shape: never two thread blocks of a product, or three of any."""
    from ojfa_export.backends.tensorrt.quantised_room import FEW, QuantisedShape, Room

    form = WeightFormat(storage="int4", group_size=128, zero_points=True)
    down, out = (QuantisedShape(4096, columns, paired=False) for columns in (11_008, 4096))
    qkv = QuantisedShape(12_288, 4096, paired=False)
    up, head = QuantisedShape(22_016, 4096, paired=True), QuantisedShape(32_000, 4096, paired=False)
    gpu, whole, system = Device(), 228 << 10, 1024
    gpu.multiprocessors, gpu.shared_bytes = 132, 227 << 10
    room = Room(gpu, form)
    assert room.most_tokens() == 32
    for tokens in (1, FEW):
        normed = [room.few(each, tokens, normed=True) + system for each in (qkv, up)]
        given = [room.few(each, tokens) + system for each in (out, down)]
        assert sum(normed) <= whole < 3 * min(normed)
        assert 2 * min(given) > whole
    assert max(normed) + min(given) <= whole
    assert room.few(down, FEW + 1) is None
    for tokens in range(1, 33):
        found = [room.batch(each, tokens) for each in (out, qkv, up, head)]
        assert [together for together, _ in found] == (
            [2, 3, 4, 4] if 8 < tokens <= 16 else [2] * 4
        )
        for _, taken in found:
            assert whole // 2 - system <= taken <= gpu.shared_bytes
    # Fewer where a thread block has less.
    gpu.shared_bytes = 99 << 10
    small = Room(gpu, form)
    assert small.few(down, 1) is not None
    assert small.few(down, 2) is None
    assert 16 <= small.most_tokens() < 32
    assert small.batch(up, 16)[0] == 1
    gpu.shared_bytes = 64 << 10
    assert 1 <= Room(gpu, form).most_tokens() < 16
