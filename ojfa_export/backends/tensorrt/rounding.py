"""Rounding weights to the nearest number of their group, in NumPy: where they aren't fitted.

8-bit floats never are: GPTQ takes a tenth of a divergence that is hardly one (docs/weights.md).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, pack
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.float8 import LARGEST


def quantise(columns: Float32, form: WeightFormat) -> QuantisedMatrix:
    """Quantises a matrix x @ W.

    Scale and zero point of a group span its weights and zero; of floats the scale makes a group's
    largest weight the largest number.

    Args:
        columns: [inputs, outputs] float32, finite; inputs are whole groups.
        form: What to make, whole numbers with zero points.
    """
    outputs = columns.shape[1]
    groups = columns.T.reshape(outputs, -1, form.group_size)
    if form.is_float:
        return _to_floats(groups)
    most = (1 << form.bits) - 1
    low = np.minimum(groups.min(axis=-1), 0)
    high = np.maximum(groups.max(axis=-1), 0)
    scales = np.maximum((high - low) / most, np.float32(1e-10)).astype(np.float32)
    points = np.clip(np.rint(-low / scales), 0, most).astype(np.uint8)
    numbers = np.rint(groups / scales[:, :, None] + points[:, :, None])
    numbers = np.clip(numbers, 0, most).astype(np.uint8).reshape(outputs, -1)
    return pack(numbers, scales, points, form)


def _to_floats(groups: Float32) -> QuantisedMatrix:
    """Of weights [outputs, groups, group size]."""
    scales = np.abs(groups).max(axis=-1) / np.float32(LARGEST)
    scales = np.maximum(scales, np.float32(1e-10))
    numbers = np.clip(groups / scales[:, :, None], -LARGEST, LARGEST)  # beyond there is NaN
    codes = numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return QuantisedMatrix(codes, scales, None)
