"""Rounding weights to the nearest number of their group, in NumPy: where they aren't fitted."""

from __future__ import annotations

import numpy as np

from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, pack
from ojfa_export.decoding.arrays import Float32


def quantise(columns: Float32, form: WeightFormat) -> QuantisedMatrix:
    """Quantises a matrix x @ W; scale and zero point of a group span its weights and zero.

    Args:
        columns: [inputs, outputs] float32, finite; inputs are whole groups.
        form: What to make, with zero points.
    """
    most = (1 << form.bits) - 1
    outputs = columns.shape[1]
    groups = columns.T.reshape(outputs, -1, form.group_size)
    low = np.minimum(groups.min(axis=-1), 0)
    high = np.maximum(groups.max(axis=-1), 0)
    scales = np.maximum((high - low) / most, np.float32(1e-10)).astype(np.float32)
    points = np.clip(np.rint(-low / scales), 0, most).astype(np.uint8)
    numbers = np.rint(groups / scales[:, :, None] + points[:, :, None])
    numbers = np.clip(numbers, 0, most).astype(np.uint8).reshape(outputs, -1)
    return pack(numbers, scales, points, form)
