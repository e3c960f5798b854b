"""Products with quantised matrices against float64; neither TensorRT nor cases are needed."""

from __future__ import annotations

import numpy as np
import pytest
from elements import DTYPES, macros
from quantised_matrices import random_matrix
from tolerances import BLOCK_BF16_RELATIVE, BLOCK_FP16_RELATIVE

from ojfa_export.backends.cuda.sources import weight_definitions
from ojfa_export.bundle.weight_format import WeightFormat, dequantise

pytestmark = pytest.mark.gpu
EPSILON = 1e-5
TOLERANCES = {"fp16": BLOCK_FP16_RELATIVE, "bf16": BLOCK_BF16_RELATIVE}
# Fewer steps than warps, tiles of one thread block and of several batches; inputs of many tokens
# that don't find room at once.
SIZES = [(256, 40), (4096, 4096), (4096, 22_016), (11_008, 4096)]


class Compiled:
    """The kernels for a precision and a format."""

    def __init__(self, precision: str, form: WeightFormat) -> None:
        from ojfa_export.backends.cuda.arrays import DTYPES as backend_dtypes
        from ojfa_export.backends.cuda.arrays import DeviceArrays
        from ojfa_export.backends.cuda.device import the_device
        from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels

        self.form, self.element = form, np.dtype(DTYPES[precision])
        self.stored, self.tolerance = backend_dtypes[precision], TOLERANCES[precision]
        self.device = the_device()
        self.device.make_current()
        quantised = (f"quantised_{what}.cu" for what in ("linear", "batch", "layout"))
        sources = ("around_products.cu", *quantised)
        defined = {
            **macros(precision),
            "NORM_LAYER": 0,
            "ACTIVATION": 0,
            "GATED": 1,
            "HIDDEN_SIZE": 4096,
            "SMALL": 0,
            **weight_definitions(form),
        }
        code = compile_kernels(defined, self.device.compute_capability, sources)
        self.kernels, self.arrays = Kernels(self.device, code), DeviceArrays(self.device)

    def upload(self, array):
        return self.arrays.upload(
            np.ascontiguousarray(array.astype(self.element)).view(self.stored)
        )

    def check(self, actual, expected):
        found = np.asarray(actual)
        if found.dtype == self.stored:
            found = found.view(self.element)
        scale = max(1.0, float(np.abs(expected).max()))
        found = found.astype(np.float64)
        np.testing.assert_allclose(found, expected, atol=self.tolerance * scale, rtol=0)


@pytest.fixture(
    scope="module",
    params=[
        ("fp16", "int4", 128),
        ("bf16", "int4", 32),
        ("fp16", "int8", 128),
        ("bf16", "int8", 64),
        ("fp16", "fp8", 128),
        ("bf16", "fp8", 128),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def compiled(request):
    precision, storage, group_size = request.param
    form = WeightFormat(storage=storage, group_size=group_size, zero_points=storage != "fp8")
    return Compiled(precision, form)


@pytest.mark.parametrize(("columns", "outputs"), SIZES)
def test_products(compiled, rng, columns, outputs):
    from ojfa_export.backends.cuda.kernels import integer, pointer
    from ojfa_export.backends.tensorrt.layout import tiles_of, words_of
    from ojfa_export.backends.tensorrt.linear import Norm
    from ojfa_export.backends.tensorrt.matrices import DeviceMatrix
    from ojfa_export.backends.tensorrt.quantised import QuantisedKernels
    from ojfa_export.backends.tensorrt.quantised_room import QuantisedShape

    form, arrays = compiled.form, compiled.arrays
    matrix = random_matrix(rng, form, outputs, columns)
    exact = dequantise(matrix, form, np.float64).T
    laid_out = {}
    for paired in (False, True):
        array = arrays.lasting((1, words_of(outputs, columns, form, paired=paired)), np.uint32)
        stored = [None if each is None else arrays.upload(each) for each in matrix[:3]]
        tiles = tiles_of(outputs, paired=paired)
        compiled.kernels.launch(
            "lay_out_quantised",
            (64, 1, 1),
            (256, 1, 1),
            (
                pointer(array.pointer),
                *(pointer(None if each is None else each.pointer) for each in stored),
                *map(integer, (outputs, columns, tiles, int(paired))),
            ),
        )
        laid_out[paired] = DeviceMatrix(array, (outputs, columns), paired)
    shapes = [QuantisedShape(outputs, columns, paired) for paired in (False, True)]
    made = (compiled.device, arrays, compiled.kernels, form, compiled.stored)
    products = QuantisedKernels(*made, shapes, columns)
    for tokens in (1, 2, 3, 8, 16, 40):
        x = rng.standard_normal((tokens, columns)).astype(compiled.element)
        out = arrays.lasting((tokens, outputs), np.float32)
        given = compiled.upload(x)
        products.linear(out, None, given, laid_out[False], None)
        compiled.check(out, x.astype(np.float64) @ exact)
        if columns > 4096:
            continue
        hidden = rng.standard_normal((tokens, columns)).astype(np.float32)
        weight = rng.uniform(0.5, 1.5, columns).astype(np.float32)
        states, norm = arrays.upload(hidden), Norm(arrays.upload(weight), None, EPSILON)
        normed = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + EPSILON) * weight
        y = normed.astype(compiled.element).astype(np.float64) @ exact
        products.norm_linear(out, states, norm, laid_out[False], None)
        compiled.check(out, y)
        width = outputs // 2
        inner = arrays.lasting((tokens, width), compiled.stored)
        products.norm_up(inner, states, norm, laid_out[True], None)
        compiled.check(inner, y[:, :width] / (1 + np.exp(-y[:, :width])) * y[:, width:])
