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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, pack
from ojfa_export.decoding.arrays import Float32

Float64 = NDArray[np.float64]
# Added to the diagonal of H, over its mean: what the paper's authors add.
DAMPING = 0.01
# Ranges that are tried for a group.
LEAST_RANGE, RANGES = 0.7, 13
# Columns whose errors are passed on to all later ones at once.
TOGETHER = 128


@dataclass(frozen=True)
class InputFactor:
    """What is known of the inputs of a matrix.

    Attributes:
        order: [inputs] int64, in which columns are rounded: largest inputs first.
        upper: U [inputs, inputs] float32, upper triangular, with H^-1 = U^T U of the damped H,
            whose rows and columns are in that order.
    """

    order: NDArray[np.int64]
    upper: Float32

    @classmethod
    def of(cls, gram: Float64) -> InputFactor:
        """The factor of H = X^T X, [inputs, inputs]; features that never were count as well."""
        order = np.argsort(-gram.diagonal(), kind="stable")
        damped = gram[np.ix_(order, order)]
        mean = float(gram.diagonal().mean()) or 1.0
        damped[np.diag_indices_from(damped)] += DAMPING * mean
        inverse = np.linalg.inv(damped)
        lower = np.linalg.cholesky((inverse + inverse.T) / 2)
        return cls(order, np.ascontiguousarray(lower.T, np.float32))


def quantise(columns: Float32, form: WeightFormat, factor: InputFactor) -> QuantisedMatrix:
    """Quantises a matrix x @ W.

    Args:
        columns: [inputs, outputs] float32, finite; inputs are whole groups.
        form: What to make, with zero points.
        factor: Of its inputs.
    """
    inputs, outputs = columns.shape
    order, upper, size = factor.order, factor.upper, form.group_size
    most = (1 << form.bits) - 1
    scales, points = _ranges_of_groups(columns, factor, size, most)
    numbers = np.empty((inputs, outputs), np.uint8)
    left = columns[order]  # a copy
    for start in range(0, inputs, TOGETHER):
        stop = min(start + TOGETHER, inputs)
        lost = np.empty((stop - start, outputs), np.float32)
        for at in range(start, stop):
            group = order[at] // size
            number = np.clip(np.rint(left[at] / scales[group] + points[group]), 0, most)
            numbers[order[at]] = number
            error = left[at] - (number - points[group]) * scales[group]
            error /= upper[at, at]
            left[at + 1 : stop] -= np.multiply.outer(upper[at, at + 1 : stop], error)
            lost[at - start] = error
        left[stop:] -= upper[start:stop, stop:].T @ lost
    return pack(numbers.T, scales.T, points.T.astype(np.uint8), form)


def _ranges_of_groups(
    columns: Float32, factor: InputFactor, size: int, most: int
) -> tuple[Float32, Float32]:
    """Scales and whole zero points [groups, outputs]."""
    diagonal = np.empty(len(columns), np.float32)
    diagonal[factor.order] = factor.upper.diagonal()
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
