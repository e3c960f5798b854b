"""Random quantised matrices, of every number that a format has."""

from __future__ import annotations

import math

import numpy as np

from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, pack

NAN = 127  # of 8-bit floats, but for the sign


def random_matrix(rng, form: WeightFormat, outputs: int, columns: int) -> QuantisedMatrix:
    """Any numbers and zero points; scales that fp16 holds, as most checkpoints'.

    Sums over the columns have a deviation of about one, whatever the numbers are.
    """
    most, groups = 1 << form.bits, columns // form.group_size
    numbers = rng.integers(most, size=(outputs, columns), dtype=np.uint8)
    points = rng.integers(most, size=(outputs, groups), dtype=np.uint8)
    if form.is_float:
        numbers[numbers & 127 == NAN] = 0
    deviation = most * math.sqrt(columns / 6)
    scales = (rng.uniform(0.5, 1.0, points.shape) / deviation).astype(np.float16)
    return pack(numbers, scales.astype(np.float32), points, form)
