"""What weight matrices are stored as, and the numbers that stored ones stand for.

A quantised matrix is three tensors beside each other. Of each column of x @ W, `group_size`
neighbouring weights share a scale and, where there are zero points, a zero point:

    weight = (number - zero point) * scale

Numbers have 4 or 8 bits and no sign, and without zero points the zero point is the middle, 8 or
128. Or they are floats of 8 bits (`models.float8`), which have no zero point.
Zero points of four bits may have a fraction, in rows behind the matrix's own (`bundle.offsets`).

A matrix that came from a checkpoint whose groups are not of neighbours (GPTQ's act-order) has a
fourth tensor: the order in which its inputs are to be gathered before they are multiplied.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import model_validator

from ojfa_export.bundle import offsets as fractions
from ojfa_export.bundle.part import Part, PositiveInt
from ojfa_export.models.float8 import E4M3
from ojfa_export.models.spec import ModelSpec

Quantised = Literal["int4", "int8", "fp8"]
Storage = Literal["fp32", "fp16", Quantised]
# Bits of a number.
BITS: dict[Quantised, int] = {"int4": 4, "int8": 8, "fp8": 8}
# What a group may be: powers of two, as MatMulNBits takes them.
GROUP_SIZES = (16, 32, 64, 128, 256)
# A quantised matrix is tensors of these names after its own; the last where there are zero points.
PACKED, SCALES, ZERO_POINTS, ORDER = ENDS = (".packed", ".scales", ".zero_points", ".order")
# The matrices of blocks that are quantised; of heads it is those to the vocabulary.
BLOCK_MATRICES = (
    *("attention.qkv.weight", "attention.out.weight"),
    *("mlp.up.weight", "mlp.down.weight"),
)


class WeightFormat(Part):
    """What the large weight matrices are stored as.

    Attributes:
        storage: Of their numbers.
        group_size: Quantised weights that share a scale; 1 where numbers stand for themselves.
        zero_points: Whether groups have a zero point of their own.
        offsets: Whether zero points have a fraction, which is kept as an offset of the group.
        wide: Matrices that are stored as precision says all the same, GRAPH/NAME each: those of a
            quantised checkpoint that are no whole numbers there.
    """

    storage: Storage
    group_size: PositiveInt = 1
    zero_points: bool = False
    offsets: bool = False
    wide: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> WeightFormat:
        if self.storage in BITS:
            if self.group_size not in GROUP_SIZES:
                raise ValueError(f"groups of {self.group_size} quantised weights can't be")
            if self.is_float and self.zero_points:
                raise ValueError(f"{self.storage} weights have no zero points")
        elif self.group_size != 1 or self.zero_points or self.wide:
            raise ValueError(f"{self.storage} weights have no groups")
        if self.offsets and not (self.storage == "int4" and self.zero_points):
            raise ValueError("offsets are fractions of zero points of four bits")
        return self

    @property
    def quantised(self) -> bool:
        """Whether matrices are numbers and scales."""
        return self.storage in BITS

    @property
    def bits(self) -> int:
        """Of a quantised number."""
        return BITS[self.storage]  # type: ignore[index]

    @property
    def is_float(self) -> bool:
        """Whether numbers are floats."""
        return self.storage == "fp8"

    @property
    def middle(self) -> int:
        """The zero point of groups of whole numbers that have none of their own."""
        return 1 << (self.bits - 1)

    def stores(self, graph: str, name: str) -> bool:
        """Whether a block's matrix, or the model's head, is quantised."""
        return f"{graph}/{name}" not in self.wide

    @property
    def head(self) -> WeightFormat | None:
        """What the model's head is stored as; None where it is as precision says."""
        return self if self.stores("final_head", "head") else None

    def rows(self, inputs: int) -> int:
        """Rows that are stored of a matrix: its inputs', and behind them its offsets' digits."""
        return inputs + (inputs // self.group_size * fractions.DIGITS if self.offsets else 0)

    def inputs_of(self, groups: int) -> int:
        """Inputs of a matrix with so many scales for each output."""
        rows = groups * self.group_size
        if not self.offsets:
            return rows
        # The last group of digits need not be full.
        return rows // (self.group_size + fractions.DIGITS) * self.group_size

    def shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a matrix, by the end of their names.

        Args:
            inputs: Features that the matrix multiplies; whole groups.
            outputs: Features that come out.
        """
        groups = -(-self.rows(inputs) // self.group_size)
        shapes: dict[str, tuple[int, ...]] = {
            PACKED: (outputs, groups, self.group_size * self.bits // 8),
            SCALES: (outputs, groups),
        }
        if self.zero_points:
            shapes[ZERO_POINTS] = (outputs, -(-groups * self.bits // 8))
        return shapes

    def __str__(self) -> str:
        if not self.quantised:
            return self.storage
        fractional = "fractional " if self.offsets else ""
        points = f" with {fractional}zero points" if self.zero_points else ""
        return f"{self.storage} in groups of {self.group_size}{points}"


def quantised_features(spec: ModelSpec) -> tuple[int, ...]:
    """Features that a model's quantised matrices multiply."""
    return spec.hidden_size, spec.heads * spec.head_dim, spec.intermediate_size


class QuantisedMatrix(NamedTuple):
    """A quantised matrix x @ W of [inputs, outputs].

    Groups are those of its inputs, and where it has offsets, behind them those of their digits.

    Attributes:
        packed: Numbers [outputs, groups, bytes] uint8; of two in a byte the first is the low half.
        scales: [outputs, groups] float32.
        zero_points: [outputs, bytes] uint8, packed alike over the groups; or None.
        order: [inputs] int32: the inputs as the groups have them; None where they are in order.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    order: NDArray[np.int32] | None = None

    def rows(self, rows: slice) -> QuantisedMatrix:
        """Some of its outputs."""
        points = None if self.zero_points is None else self.zero_points[rows]
        return QuantisedMatrix(self.packed[rows], self.scales[rows], points, self.order)


def matrix_of(tensors: dict[str, NDArray[Any]], name: str) -> QuantisedMatrix | None:
    """The quantised matrix of a name among a graph's tensors, if it is one."""
    packed = tensors.get(f"{name}{PACKED}")
    if packed is None:
        return None
    scales, points = tensors[f"{name}{SCALES}"], tensors.get(f"{name}{ZERO_POINTS}")
    return QuantisedMatrix(packed, scales, points, tensors.get(f"{name}{ORDER}"))


def dequantise(
    matrix: QuantisedMatrix, form: WeightFormat, dtype: DTypeLike = np.float32
) -> NDArray[Any]:
    """The numbers that a quantised matrix stands for.

    Args:
        matrix: Some of its outputs, or all.
        form: Its format.
        dtype: Of the result; float64 holds the product of number and scale exactly.

    Returns:
        [outputs, inputs].
    """
    outputs, groups = matrix.scales.shape
    codes = _unpacked(matrix.packed.reshape(outputs, -1), form.bits)
    codes = codes.reshape(outputs, groups, form.group_size)
    numbers = (E4M3[codes] if form.is_float else codes).astype(dtype)
    if matrix.zero_points is not None:
        numbers -= _unpacked(matrix.zero_points, form.bits)[:, :groups, None].astype(dtype)
    elif not form.is_float:
        numbers -= form.middle
    numbers *= matrix.scales[:, :, None].astype(dtype)
    weights = numbers.reshape(outputs, -1)
    if form.offsets:
        weights = _with_offsets(weights, form.inputs_of(groups), form)
    if matrix.order is None:
        return weights
    in_place = np.empty_like(weights)
    in_place[:, matrix.order] = weights
    return in_place


def _with_offsets(rows: NDArray[Any], inputs: int, form: WeightFormat) -> NDArray[Any]:
    """Weights [outputs, inputs] of rows [outputs, rows] with the digits of their offsets."""
    weights, digits = rows[:, :inputs], rows[:, inputs : form.rows(inputs)]
    by_group = weights.reshape(len(rows), -1, form.group_size)
    moved: NDArray[Any] = by_group + fractions.of_digits(digits)[:, :, None]
    return moved.reshape(len(rows), -1)


def pack(
    numbers: NDArray[np.uint8],
    scales: NDArray[np.float32],
    points: NDArray[np.uint8],
    form: WeightFormat,
    order: NDArray[np.int32] | None = None,
    offsets: NDArray[np.float32] | None = None,
) -> QuantisedMatrix:
    """Puts a quantised matrix together.

    Args:
        numbers: [outputs, inputs], as the groups have the inputs.
        scales: [outputs, groups].
        points: Zero points [outputs, groups], the middle where the format has none.
        form: The format.
        order: Of the inputs.
        offsets: [outputs, groups], where the format has them.
    """
    if offsets is not None:
        numbers, scales, points = _followed_by(offsets, numbers, scales, points, form.group_size)
    outputs, groups = scales.shape
    if not form.zero_points:
        packed_points = None
    elif form.bits == 4:
        packed_points = _in_pairs(np.pad(points, ((0, 0), (0, groups % 2))))
    else:
        packed_points = np.ascontiguousarray(points)
    flat = _in_pairs(numbers) if form.bits == 4 else np.ascontiguousarray(numbers)
    return QuantisedMatrix(
        flat.reshape(outputs, groups, -1), np.ascontiguousarray(scales), packed_points, order
    )


def _followed_by(
    offsets: NDArray[np.float32],
    numbers: NDArray[np.uint8],
    scales: NDArray[np.float32],
    points: NDArray[np.uint8],
    group_size: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Numbers, scales and zero points with those of the offsets' digits behind them."""
    digits, scale = fractions.to_digits(offsets)
    more = -(-digits.shape[1] // group_size)  # groups, the last of which is filled up with zeros
    filled = np.pad(
        digits,
        ((0, 0), (0, more * group_size - digits.shape[1])),
        constant_values=fractions.MIDDLE,
    )
    middles = np.full((len(points), more), fractions.MIDDLE, np.uint8)
    return (
        np.concatenate([numbers, filled], axis=1),
        np.concatenate([scales, np.repeat(scale, more, axis=1)], axis=1),
        np.concatenate([points, middles], axis=1),
    )


def _in_pairs(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Numbers of four bits [rows, n], two in a byte."""
    return numbers[:, 0::2] | np.left_shift(numbers[:, 1::2], 4, dtype=np.uint8)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of bytes [rows, bytes], one each."""
    if bits == 8:
        return packed
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(len(packed), -1)
