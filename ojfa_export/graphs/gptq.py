"""GPTQ (Frantar et al., arXiv 2210.17323): quantising a matrix by what it is multiplied with.

Columns are rounded one after the other. What rounding one loses is made good by those that are not
rounded yet, as far as inputs that go together allow: H = X^T X of the inputs says how far. Compared
with rounding each weight to the nearest number, weights are farther off and products nearer.

Columns whose inputs are largest come first ("act-order" of the authors' code): what they lose can
be made good by most others. Groups stay those of neighbours all the same, so that nothing is
gathered where the matrix runs: their ranges are chosen before any column is rounded
(`graphs.ranges`), by the squared error that counts: each column's weighted by what it costs to be
wrong there after the later ones have made good what they can.
"""

from __future__ import annotations

import numpy as np

from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat
from ojfa_export.decoding.arrays import Float32
from ojfa_export.graphs.input_factor import InputFactor
from ojfa_export.graphs.ranges import Ranges

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
    diagonal = np.empty(inputs, np.float32)
    diagonal[order] = factor.diagonal
    ranges = Ranges.of(columns, form, diagonal)
    scales, points, offsets = ranges.scales, ranges.points, ranges.offsets
    numbers = np.empty((inputs, outputs), np.uint8)
    left = columns[order]  # a copy
    for start in range(0, inputs, TOGETHER):
        stop = min(start + TOGETHER, inputs)
        upper = factor.rows(start, stop)
        lost = np.empty((stop - start, outputs), np.float32)
        for row, at in enumerate(range(start, stop)):
            group = order[at] // size
            moved = left[at] - offsets[group]
            number = np.clip(np.rint(moved / scales[group] + points[group]), 0, most)
            numbers[order[at]] = number
            error = moved - (number - points[group]) * scales[group]
            error /= upper[row, row]
            left[at + 1 : stop] -= np.multiply.outer(upper[row, row + 1 : stop - start], error)
            lost[row] = error
        left[stop:] -= upper[:, stop - start :].T @ lost
    return ranges.packed(numbers)
