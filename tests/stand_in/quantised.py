"""The layout of quantised matrices on the device (numbers.cuh), in NumPy."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import ml_dtypes
import numpy as np

TILE, STEP = 16, 128


class Layout:
    """Where each number and each scale of a matrix lies.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        paired: Whether tiles have gates and what they are multiplied with, eight rows of each.
        bits: Of a number.
        group: Columns that share a scale.
        floats: Whether numbers are 8-bit floats, whose scales have no zero point beside them.
    """

    def __init__(
        self, rows: int, columns: int, paired: bool, bits: int, group: int, floats: bool = False
    ) -> None:
        self.floats = floats
        self.bits, self.shape = bits, (rows, columns)
        half = rows // 2
        tiles = -(-half // 8) if paired else -(-rows // TILE)
        steps, of_step = -(-columns // STEP), max(1, STEP // group)
        tile, step, row, column = np.indices((tiles, steps, TILE, STEP))
        if paired:
            feature = tile * 8 + row % 8
            of_matrix = np.where(feature < half, feature + row // 8 * half, rows)
        else:
            of_matrix = tile * TILE + row
        column_of_matrix = step * STEP + column
        there = (of_matrix < rows) & (column_of_matrix < columns)
        # Of a product's word: the lane has rows lane / 4 and lane / 4 + 8, four columns.
        product = column // 32 * 2 + column % 8 // 4
        lane = row % 8 * 4 + column % 32 // 8
        j = column % 4
        if bits == 4:
            word, shift = product, j % 2 * 16 + j // 2 * 8 + row // 8 * 4
        else:
            word, shift = product * 2 + row // 8, j * 8
        at = (word // 4 * 32 + lane) * 4 + word % 4
        words = STEP // 16 * (bits // 4) * 32
        self.number_words = tiles * steps * words
        whole = (tile * steps + step) * words + at
        self._from = of_matrix[there], column_of_matrix[there]
        self._to, self._shift = whole[there], shift[there]
        # Scales: of rows 0, 8, 1, 9, ...
        tile, step, each, row = np.indices((tiles, steps, of_step, TILE))
        of_group = (step * STEP + each * (STEP // of_step)) // group
        if paired:
            feature = tile * 8 + row % 8
            of_matrix = np.where(feature < half, feature + row // 8 * half, rows)
        else:
            of_matrix = tile * TILE + row
        at = ((tile * steps + step) * of_step + each) * TILE + row % 8 * 2 + row // 8
        there = (of_matrix < rows) & (of_group < columns // group)
        self._scales_from, self._scales_to = (of_matrix[there], of_group[there]), at[there]
        self.scale_words = tiles * steps * of_step * TILE
        self.groups, self._group = columns // group, group

    def put(self, out: np.ndarray, numbers: np.ndarray, words: np.ndarray) -> None:
        """Writes numbers [rows, columns], and scales with zero points [rows, groups], as words."""
        out[...] = 0
        found = numbers[self._from].astype(np.uint32) << self._shift.astype(np.uint32)
        np.bitwise_or.at(out, self._to, found)
        out[self.number_words + self._scales_to] = words[self._scales_from]

    def take(self, matrix: np.ndarray) -> np.ndarray:
        """What a matrix stands for: [rows, columns] float32."""
        mask = (1 << self.bits) - 1
        numbers = np.zeros(self.shape, np.uint8)
        numbers[self._from] = matrix[self._to] >> self._shift.astype(np.uint32) & mask
        words = np.zeros((self.shape[0], self.groups), np.uint32)
        words[self._scales_from] = matrix[self.number_words + self._scales_to]
        if self.floats:
            floats = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            return floats * np.repeat(words.view(np.float32), self._group, axis=1)
        points = np.repeat((words & mask).astype(np.float32), self._group, axis=1)
        scales = np.repeat((words & ~np.uint32(mask)).view(np.float32), self._group, axis=1)
        return (numbers.astype(np.float32) - points) * scales


@cache
def layout_of(rows: int, columns: int, paired: bool, bits: int, group: int, floats: bool) -> Layout:
    """A layout, made once."""
    return Layout(rows, columns, paired, bits, group, floats)


def stored_words(
    a: SimpleNamespace, bits: int, group: int, floats: bool, view
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [rows, columns] of MatMulNBits' layout, and words of scales and zero points."""
    rows, columns, groups = a.rows, a.columns, a.columns // group

    def unpacked(pointer: int, count: int) -> np.ndarray:
        packed = view(pointer, np.uint8, rows, -(-count * bits // 8))
        if bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, :count]

    if floats:
        return unpacked(a.numbers, columns), view(a.scales, np.uint32, rows, groups)
    middle = 1 << (bits - 1)
    points = unpacked(a.zero_points, groups) if a.zero_points else np.full((rows, groups), middle)
    scales = view(a.scales, np.uint32, rows, groups)
    words = (scales + np.uint32(middle)) & ~np.uint32((1 << bits) - 1) | points.astype(np.uint32)
    return unpacked(a.numbers, columns), words
