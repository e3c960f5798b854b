"""GPTQ (Frantar et al., arXiv 2210.17323): quantising a matrix by what it is multiplied with.

Columns are rounded one after the other. What rounding one loses is made good by those that are not
rounded yet, as far as inputs that go together allow: H = X^T X of the inputs says how far. Compared
with rounding each weight to the nearest number, weights are farther off and products nearer.

Columns whose inputs are largest come first ("act-order" of the authors' code): what they lose can
be made good by most others. Groups stay those of neighbours all the same, so that nothing is
gathered where the matrix runs: their scales and zero points are chosen before any column is
rounded, among ranges from all of a group's weights down to LEAST_RANGE of that, by the squared
error that counts: each column's weighted by what it costs to be wrong there after the later ones
have made good what they can.
"""

from __future__ import annotations

import numpy as np

from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, pack
from ojfa_export.decoding.arrays import Float32
from ojfa_export.graphs.input_factor import InputFactor

# Ranges that are tried for a group.
LEAST_RANGE, RANGES = 0.7, 13
# Columns whose errors are passed on to all later ones at once; panels of a factor are whole ones.
TOGETHER = 128


def quantise(columns: Float32, form: WeightFormat, factor: InputFactor) -> QuantisedMatrix:
    """Quantises a matrix x @ W.

    Args:
        columns: [inputs, outputs] float32, finite; inputs are whole groups.
        form: What to make, with zero points.
        factor: Of its inputs.
    """
    inputs, outputs = columns.shape
    order, size = factor.order, form.group_size
    most = (1 << form.bits) - 1
    scales, points = _ranges_of_groups(columns, factor, size, most)
    numbers = np.empty((inputs, outputs), np.uint8)
    left = columns[order]  # a copy
    for start in range(0, inputs, TOGETHER):
        stop = min(start + TOGETHER, inputs)
        upper = factor.rows(start, stop)
        lost = np.empty((stop - start, outputs), np.float32)
        for row, at in enumerate(range(start, stop)):
            group = order[at] // size
            number = np.clip(np.rint(left[at] / scales[group] + points[group]), 0, most)
            numbers[order[at]] = number
            error = left[at] - (number - points[group]) * scales[group]
            error /= upper[row, row]
            left[at + 1 : stop] -= np.multiply.outer(upper[row, row + 1 : stop - start], error)
            lost[row] = error
        left[stop:] -= upper[:, stop - start :].T @ lost
    return pack(numbers.T, scales.T, points.T.astype(np.uint8), form)


def _ranges_of_groups(
    columns: Float32, factor: InputFactor, size: int, most: int
) -> tuple[Float32, Float32]:
    """Scales and whole zero points [groups, outputs]."""
    diagonal = np.empty(len(columns), np.float32)
    diagonal[factor.order] = factor.diagonal
    groups = [slice(at, at + size) for at in range(0, len(columns), size)]
    found = [_ranges(columns[group], diagonal[group], most) for group in groups]
    scales, points = (np.stack(each) for each in zip(*found, strict=True))
    return scales, points


def _ranges(weights: Float32, diagonal: Float32, most: int) -> tuple[Float32, Float32]:
    """Scales and whole zero points [outputs] of a group [columns, outputs]."""
    cost = (1 / diagonal.astype(np.float32) ** 2)[:, None]
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    best = np.full(low.shape, np.inf, np.float32)
    scales, points = np.ones_like(low), np.zeros_like(low)
    for share in np.linspace(1.0, LEAST_RANGE, RANGES, dtype=np.float32):
        scale = np.maximum((high - low) * share / most, np.float32(1e-10))
        point = np.clip(np.rint(-low * share / scale), 0, most)
        numbers = np.clip(np.rint(weights / scale + point), 0, most)
        error = (((weights - (numbers - point) * scale) ** 2) * cost).sum(axis=0)
        better = error < best
        best = np.where(better, error, best)
        scales, points = np.where(better, scale, scales), np.where(better, point, points)
    return scales, points
