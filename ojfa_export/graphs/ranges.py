"""What the numbers of quantised groups stand for.

    weight = (number - zero point) * scale + offset

Ranges are chosen among those from all of a group's weights, and zero, down to LEAST_RANGE of that,
by the squared error that counts. Zero points are whole; where the format has offsets these are the
fractions that are left (`bundle.offsets`), as in GGUF's Q4_1 (d q + m) and HQQ's models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle import offsets as fractions
from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat, pack
from ojfa_export.decoding.arrays import Float32

# Ranges that are tried for a group.
LEAST_RANGE, RANGES = 0.7, 13


@dataclass(frozen=True)
class Ranges:
    """Of all groups of a matrix [inputs, outputs].

    Attributes:
        form: Of the matrix.
        scales: [groups, outputs].
        points: Whole zero points [groups, outputs].
        offsets: [groups, outputs], as they are stored; zeros where the format has none.
    """

    form: WeightFormat
    scales: Float32
    points: Float32
    offsets: Float32

    @classmethod
    def of(cls, columns: Float32, form: WeightFormat, diagonal: Float32 | None = None) -> Ranges:
        """Chooses them.

        Args:
            columns: [inputs, outputs]; inputs are whole groups.
            form: With zero points.
            diagonal: [inputs], over whose squares errors count; None where all count alike.
        """
        size = form.group_size
        if diagonal is None:
            diagonal = np.ones(len(columns), np.float32)
        groups = [slice(at, at + size) for at in range(0, len(columns), size)]
        found = [_range_of_group(columns[group], diagonal[group], form) for group in groups]
        scales, points = (np.stack(each) for each in zip(*found, strict=True))
        if not form.offsets:
            return cls(form, scales, points, np.zeros_like(scales))
        whole = np.rint(points)
        return cls(form, scales, whole, fractions.rounded(((whole - points) * scales).T).T)

    def packed(self, numbers: NDArray[np.uint8]) -> QuantisedMatrix:
        """The matrix of numbers [inputs, outputs]."""
        offsets = self.offsets.T if self.form.offsets else None
        points = self.points.T.astype(np.uint8)
        return pack(numbers.T, self.scales.T, points, self.form, offsets=offsets)


def nearest(columns: Float32, form: WeightFormat) -> QuantisedMatrix:
    """Rounds each weight of a matrix x @ W to the nearest number.

    Args:
        columns: [inputs, outputs] float32, finite; inputs are whole groups.
        form: What to make, with zero points.
    """
    ranges = Ranges.of(columns, form)
    scales, points, offsets = (
        np.repeat(each, form.group_size, axis=0)
        for each in (ranges.scales, ranges.points, ranges.offsets)
    )
    numbers = np.clip(np.rint((columns - offsets) / scales + points), 0, (1 << form.bits) - 1)
    return ranges.packed(numbers.astype(np.uint8))


def _range_of_group(
    weights: Float32, diagonal: Float32, form: WeightFormat
) -> tuple[Float32, Float32]:
    """Scales and zero points [outputs] of a group [columns, outputs]; whole without offsets."""
    most = (1 << form.bits) - 1
    cost = (1 / diagonal.astype(np.float32) ** 2)[:, None]
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    best = np.full(low.shape, np.inf, np.float32)
    scales, points = np.ones_like(low), np.zeros_like(low)
    for share in np.linspace(1.0, LEAST_RANGE, RANGES, dtype=np.float32):
        scale = np.maximum((high - low) * share / most, np.float32(1e-10))
        point = np.clip(-low * share / scale, 0, most)
        if not form.offsets:
            point = np.rint(point)
        numbers = np.clip(np.rint(weights / scale + point), 0, most)
        error = (((weights - (numbers - point) * scale) ** 2) * cost).sum(axis=0)
        better = error < best
        best = np.where(better, error, best)
        scales, points = np.where(better, scale, scales), np.where(better, point, points)
    return scales, points
