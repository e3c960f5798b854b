"""Quantised matrices of a checkpoint as they are: numbers, scales, zero points.

    weight[output, input] = (number - zero point) * scale

with scale and zero point those of the input's group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
# Weights that are dequantised at once, beside which their scales are spread out.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Kept:
    """A matrix x @ W of whole numbers.

    Attributes:
        bits: Of a number, 2 to 8.
        scales: [outputs, groups] float32.
        zero_points: [outputs, groups] uint8, below 2^bits.
        group_of: [inputs] int32: which group each input is of.
        numbers: Reads the numbers, [outputs, inputs] uint8.
    """

    bits: int
    scales: Float32
    zero_points: UInt8
    group_of: NDArray[np.int32]
    numbers: Callable[[], UInt8]

    @property
    def inputs(self) -> int:
        """Features that it multiplies."""
        return len(self.group_of)

    @property
    def group_size(self) -> int | None:
        """Inputs of a group; None where groups have different sizes."""
        sizes = np.bincount(self.group_of, minlength=self.scales.shape[1])
        return int(sizes[0]) if (sizes == sizes[0]).all() else None

    @property
    def order(self) -> NDArray[np.int32] | None:
        """The inputs group by group; None where they are so already."""
        if (np.diff(self.group_of) >= 0).all():
            return None
        return np.argsort(self.group_of, kind="stable").astype(np.int32)

    def dequantised(self) -> Float32:
        """The weights [outputs, inputs]; each is one product, rounded once."""
        numbers = self.numbers()
        weights = np.empty(numbers.shape, np.float32)
        step = max(1, _AT_ONCE // self.inputs)
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            np.subtract(
                numbers[rows],
                self.zero_points[rows][:, self.group_of],
                weights[rows],
                dtype=np.float32,
            )
            weights[rows] *= self.scales[rows][:, self.group_of]
        return weights

    def outputs_at(self, order: NDArray[Any]) -> Kept:
        """Some outputs, in an order."""
        return replace(
            self,
            scales=self.scales[order],
            zero_points=self.zero_points[order],
            numbers=lambda: self.numbers()[order],
        )

    def times(self, factor: float) -> Kept:
        """The weights multiplied: the scales are, rounded to fp32."""
        return self if factor == 1 else replace(self, scales=self.scales * np.float32(factor))

    def widened(self, bits: int) -> Kept:
        """The same weights as numbers of as many bits or more; the middle stays in the middle."""
        shift = np.uint8((1 << bits - 1) - (1 << self.bits - 1))
        return replace(
            self,
            bits=bits,
            zero_points=self.zero_points + shift,
            numbers=lambda: self.numbers() + shift,
        )

    def in_order(self) -> Kept:
        """The same weights with the inputs as `order` has them."""
        order = self.order
        if order is None:
            return self
        return replace(
            self, group_of=self.group_of[order], numbers=lambda: self.numbers()[:, order]
        )

    def split(self, group_size: int) -> Kept:
        """The same weights in smaller groups: in order, and of a size that divides this one's."""
        assert self.group_size is not None
        times = self.group_size // group_size
        if times == 1:
            return self
        return replace(
            self,
            scales=np.repeat(self.scales, times, axis=1),
            zero_points=np.repeat(self.zero_points, times, axis=1),
            group_of=groups_in_order(self.inputs, group_size),
        )


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix x @ W of 8-bit floats.

    Attributes:
        scales: [outputs, inputs] float32 of blocks of weights, either of them 1 for all.
        block: Weights of a block, outputs and inputs.
        shape: Outputs and inputs of the matrix.
        numbers: Reads the numbers, [outputs, inputs] in fp8.
    """

    scales: Float32
    block: tuple[int, int]
    shape: tuple[int, int]
    numbers: Callable[[], NDArray[Any]]

    def by_output(self) -> Scaled:
        """The same weights with scales of each output."""
        scales = np.repeat(self.scales, self.block[0], axis=0)[: self.shape[0]]
        return replace(self, scales=scales, block=(1, self.block[1]))

    def outputs_at(self, order: NDArray[Any]) -> Scaled:
        """Some outputs, in an order."""
        by_output, shape = self.by_output(), (len(order), self.shape[1])
        scales = by_output.scales[order]
        return replace(by_output, scales=scales, shape=shape, numbers=lambda: self.numbers()[order])

    def times(self, factor: float) -> Scaled:
        """The weights multiplied: the scales are, rounded to fp32."""
        return self if factor == 1 else replace(self, scales=self.scales * np.float32(factor))

    def scales_of(self, group_size: int) -> Float32:
        """Of each output, [outputs, groups], of groups that divide blocks and inputs."""
        firsts = np.arange(0, self.shape[1], group_size)
        return np.ascontiguousarray(self.by_output().scales[:, firsts // self.block[1]])

    def dequantised(self) -> Float32:
        """The weights [outputs, inputs]; each is one product, rounded once."""
        weights = self.numbers().astype(np.float32)
        by_row = np.repeat(self.scales, self.block[0], axis=0)[: len(weights)]
        for start in range(0, weights.shape[1], self.block[1]):
            weights[:, start : start + self.block[1]] *= by_row[:, start // self.block[1], None]
        return weights


def groups_in_order(inputs: int, group_size: int) -> NDArray[np.int32]:
    """Each input's group, where neighbours share one."""
    return (np.arange(inputs) // group_size).astype(np.int32)


def beside(parts: Sequence[Kept | Scaled]) -> Kept | Scaled | None:
    """Matrices of the same inputs as one, with their outputs one after the other.

    Returns:
        None where that can't be: some are whole numbers and some floats, or inputs are grouped in
        different orders, or floats in blocks of different widths.
    """
    if len(parts) == 1:
        return parts[0]
    whole = [part for part in parts if isinstance(part, Kept)]
    floats = [part.by_output() for part in parts if isinstance(part, Scaled)]
    if whole and floats:
        return None
    return _whole_beside(whole) if whole else _floats_beside(floats)


def _floats_beside(parts: Sequence[Scaled]) -> Scaled | None:
    first = parts[0]
    if any(part.block != first.block for part in parts):
        return None
    return Scaled(
        np.concatenate([part.scales for part in parts]),
        first.block,
        (sum(part.shape[0] for part in parts), first.shape[1]),
        lambda: np.concatenate([part.numbers() for part in parts]),
    )


def _whole_beside(parts: Sequence[Kept]) -> Kept | None:
    """Numbers get the bits of the widest, groups the largest size that divides all."""
    bits = max(part.bits for part in parts)
    if all(np.array_equal(part.group_of, parts[0].group_of) for part in parts):
        same = [part.widened(bits) for part in parts]
    else:
        sizes = [part.group_size for part in parts if part.order is None]
        if len(sizes) < len(parts) or None in sizes:
            return None
        size = math.gcd(*(each for each in sizes if each is not None))
        same = [part.widened(bits).split(size) for part in parts]
    return Kept(
        bits,
        np.concatenate([part.scales for part in same]),
        np.concatenate([part.zero_points for part in same]),
        same[0].group_of,
        lambda: np.concatenate([part.numbers() for part in same]),
    )
