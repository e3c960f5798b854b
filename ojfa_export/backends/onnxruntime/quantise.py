"""Quantises matrices as ONNX Runtime's MatMulNBits reads them, by ONNX Runtime's own code.

It rounds to the nearest number of each group, whose scale and zero point span its smallest and
largest weight: no weight is off by more than half a step. `onnxruntime.quantization` calls the same
functions, on models; that module needs onnx_ir and ml_dtypes, of which matrices need nothing. Its
other ways were tried or read, and not taken: k-quant's weights are farther off (it rounds its zero
points after it has fitted them), half-quadratic quantisation needs torch, GPTQ and AWQ need text
and the model's activations (docs/weights.md has the figures).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi import _pybind_state as library

from ojfa_export.bundle.weight_format import (
    PACKED,
    SCALES,
    ZERO_POINTS,
    QuantisedMatrix,
    WeightFormat,
)
from ojfa_export.graphs.ranges import nearest


def quantise(columns: NDArray[np.float32], form: WeightFormat) -> QuantisedMatrix:
    """Quantises a matrix x @ W.

    Args:
        columns: [inputs, outputs] float32, finite, in C order; inputs are whole groups.
        form: What to make.
    """
    if form.offsets:  # which ONNX Runtime doesn't know
        return nearest(columns, form)
    inputs, outputs = columns.shape
    shapes = form.shapes(inputs, outputs)
    packed = np.zeros(shapes[PACKED], np.uint8)
    scales = np.zeros(shapes[SCALES], np.float32)
    # The functions write zero points in any case, where they are the middle as well.
    groups = inputs // form.group_size
    points = np.zeros((outputs, -(-groups * form.bits // 8)), np.uint8)
    function = library.quantize_matmul_4bits if form.bits == 4 else library.quantize_matmul_8bits
    symmetric = not form.zero_points
    function(packed, columns, scales, points, form.group_size, outputs, inputs, symmetric)
    return QuantisedMatrix(packed, scales, points if ZERO_POINTS in shapes else None)
