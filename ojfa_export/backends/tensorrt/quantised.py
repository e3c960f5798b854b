"""Launching products with quantised matrices (engines/kernels/quantised_linear.cu)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Argument, Kernels, integer, pointer
from ojfa_export.backends.tensorrt.linear import Norm, address
from ojfa_export.backends.tensorrt.matrices import (
    LAYOUT_THREADS,
    STEP,
    TILE,
    DeviceMatrix,
    Matrix,
    step_bytes,
)
from ojfa_export.backends.tensorrt.products import Products, ProductsWith
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError

# Tokens of a step in these kernels; with more a library multiplies, and reading the weights takes
# less than turning them into elements. At once, whatever the kernels have sums for.
MOST_QUANTISED_TOKENS, AT_ONCE = 48, 16
# A product normalises so many tokens itself; of more a kernel before it does.
NORMED = 2
# As in the kernels: warps, tiles that one takes a step of at once, steps that are on their way, by
# the tokens that a kernel is made for and in one that normalises; and tiles whose sums are kept.
WARPS, TOGETHER = 8, 2
RINGS, NORMED_RING = {2: 3, 8: 2, 16: 3}, 4
KEPT = {1: 16, 2: 8}
NORM_THREADS = 512
# Bytes beyond the inputs of a token, and of its sums of a tile, in shared memory.
SHIFT, SUMS_BYTES = 64, 4 * (TILE + 4)
# Shared memory that the system and the kernels themselves take of a thread block, and parts of the
# columns for which the inputs may be brought one after the other.
DECLARED, MOST_PASSES = 1280, 3


class QuantisedKernels:
    """Products with quantised matrices, in fp16 or bf16; see `Products`.

    Args:
        device: Where they run.
        arrays: Makes arrays there.
        kernels: Compiled for that precision and the format.
        form: What matrices are stored as.
        dtype: Of the precision.
        columns: Of the matrices that multiply what is normalised.
    """

    def __init__(
        self,
        device: Device,
        arrays: DeviceArrays,
        kernels: Kernels,
        form: WeightFormat,
        dtype: np.dtype[Any],
        columns: int,
    ) -> None:
        self._device, self._kernels, self._form = device, kernels, form
        self._normed = arrays.lasting((MOST_QUANTISED_TOKENS, columns), dtype)

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = norm(hidden) matrix^T + bias."""
        if len(hidden) <= NORMED:
            self._launch_normed("norm_quantised_linear", out, hidden, norm, matrix, bias)
        else:
            self.linear(out, None, self._norm(hidden, norm), matrix, bias)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """inner [tokens, width] = the MLP's activated (and gated) products with norm(hidden)."""
        if len(hidden) <= NORMED:
            self._launch_normed("norm_quantised_up", inner, hidden, norm, matrix, bias)
            return
        x = self._norm(hidden, norm)
        for rows in _at_once(len(inner)):
            out = pointer(inner[rows].pointer)
            self._launch("quantised_up", (out,), x[rows], matrix, bias, inner.shape[-1])

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = residual + x matrix^T + bias; out may be the residual."""
        for rows in _at_once(len(x)):
            added = None if residual is None else residual[rows]
            arguments = (pointer(out[rows].pointer), pointer(address(added)))
            self._launch("quantised_linear", arguments, x[rows], matrix, bias, matrix.shape[0])

    def _norm(self, hidden: DeviceArray, norm: Norm) -> DeviceArray:
        tokens, width = hidden.shape
        result = self._normed[:tokens]
        self._kernels.launch(
            "normalize",
            (tokens, 1, 1),
            (NORM_THREADS, 1, 1),
            (
                pointer(result.pointer),
                *norm.arguments(hidden),
                *map(integer, (width, result.shape[1])),
            ),
            overlapping=True,
        )
        return result

    def _launch_normed(
        self,
        kind: str,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        tokens, width = hidden.shape
        arguments = (
            pointer(out.pointer),
            *norm.arguments(hidden),
            integer(width),
            *_matrix(matrix, bias),
            *map(integer, (matrix.shape[1], out.shape[-1], tokens)),
        )
        steps = math.ceil(matrix.shape[1] / STEP)
        shared = self._shared_bytes(tokens, matrix, steps, NORMED_RING)
        self._put(kind, matrix, shared, arguments)

    def _launch(
        self,
        kind: str,
        results: tuple[Argument, ...],
        x: DeviceArray,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
        width: int,
    ) -> None:
        tokens, columns = x.shape
        steps, shared = self._pass(tokens, matrix)
        arguments = (
            *results,
            pointer(x.pointer),
            *_matrix(matrix, bias),
            *map(integer, (columns, width, tokens, steps)),
        )
        self._put(f"{kind}_{_made_for(tokens)}", matrix, shared, arguments)

    def _put(
        self, kernel: str, matrix: DeviceMatrix, shared: int, arguments: tuple[Argument, ...]
    ) -> None:
        """Launches a kernel.

        A thread block of the next one finds room beside one of this, but two of either don't: else
        one multiprocessor might have two, and another none.
        """
        whole = self._device.shared_bytes + DECLARED
        least = whole // 3 if shared <= whole // 2 - DECLARED else whole // 2
        self._kernels.launch(
            kernel,
            (min(matrix.tiles, self._device.multiprocessors), 1, 1),
            (32 * WARPS, 1, 1),
            arguments,
            shared_bytes=max(shared, least),
            overlapping=True,
        )

    def _pass(self, tokens: int, matrix: DeviceMatrix) -> tuple[int, int]:
        """Columns, in steps, of which the inputs find room at once, and the memory that takes.

        All columns or, where so the next kernel's thread blocks find room as well, equal parts.
        """
        steps, most = math.ceil(matrix.shape[1] / STEP), self._device.shared_bytes
        ring, taken = RINGS[_made_for(tokens)], 0
        for room in ((most + DECLARED) // 2 - DECLARED, most - DECLARED):
            for passes in range(1, (MOST_PASSES if room < most - DECLARED else steps) + 1):
                each = math.ceil(steps / passes)
                taken = self._shared_bytes(tokens, matrix, each, ring)
                if taken <= room:
                    return each, taken
        raise BackendError(
            f"products of {tokens} tokens with weights of {self._form.storage} take {taken >> 10} "
            f"KiB of shared memory, and {self._device.name} has {most >> 10}",
            hint="use fewer sequences at once, or build without --weights",
        )

    def _shared_bytes(self, tokens: int, matrix: DeviceMatrix, pass_steps: int, ring: int) -> int:
        """Inputs of a pass, sums that are kept, and steps that are on their way."""
        kept = KEPT.get(tokens, TOGETHER)
        if pass_steps * STEP < matrix.shape[1]:
            kept = math.ceil(matrix.tiles / min(matrix.tiles, self._device.multiprocessors))
        inputs = tokens * (2 * STEP * pass_steps + SHIFT)
        on_the_way = ring * TOGETHER * step_bytes(self._form)
        return inputs + WARPS * (kept * tokens * SUMS_BYTES + on_the_way)


class DequantisedProducts:
    """Products of many tokens: with a matrix that is turned into elements before each.

    Args:
        device: Where they run.
        arrays: Makes arrays there.
        kernels: Compiled for the precision and the format.
        products: Makes them.
        dtype: Of the precision.
        elements: Of the largest matrix.
    """

    def __init__(
        self,
        device: Device,
        arrays: DeviceArrays,
        kernels: Kernels,
        products: Products,
        dtype: np.dtype[Any],
        elements: int,
    ) -> None:
        self._device, self._kernels, self._products = device, kernels, products
        self._elements = arrays.lasting((1, elements), dtype)

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """See `Products`."""
        self._products.norm_linear(out, hidden, norm, self._dequantised(matrix), bias)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """See `Products`."""
        self._products.norm_up(inner, hidden, norm, self._dequantised(matrix), bias)

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """See `Products`."""
        self._products.linear(out, residual, x, self._dequantised(matrix), bias)

    def _dequantised(self, matrix: DeviceMatrix) -> DeviceArray:
        result = self._elements.reshape(*matrix.shape)
        rows, columns = matrix.shape
        self._kernels.launch(
            "dequantise",
            (8 * self._device.multiprocessors, 1, 1),
            (LAYOUT_THREADS, 1, 1),
            (
                *(pointer(result.pointer), pointer(matrix.array.pointer)),
                pointer(address(matrix.order)),
                *map(integer, (rows, columns, matrix.tiles, int(matrix.paired))),
            ),
            overlapping=True,
        )
        return result


class ByMatrix:
    """Products with each matrix as it is stored: see `Products`.

    Args:
        plain: With those that aren't quantised.
        quantised: With those that are.
    """

    def __init__(self, plain: Products, quantised: ProductsWith[DeviceMatrix]) -> None:
        self._plain, self._quantised = plain, quantised

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: Matrix,
        bias: DeviceArray | None,
    ) -> None:
        """See `Products`."""
        if isinstance(matrix, DeviceMatrix):
            self._quantised.norm_linear(out, hidden, norm, matrix, bias)
        else:
            self._plain.norm_linear(out, hidden, norm, matrix, bias)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: Matrix,
        bias: DeviceArray | None,
    ) -> None:
        """See `Products`."""
        if isinstance(matrix, DeviceMatrix):
            self._quantised.norm_up(inner, hidden, norm, matrix, bias)
        else:
            self._plain.norm_up(inner, hidden, norm, matrix, bias)

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: Matrix,
        bias: DeviceArray | None,
    ) -> None:
        """See `Products`."""
        if isinstance(matrix, DeviceMatrix):
            self._quantised.linear(out, residual, x, matrix, bias)
        else:
            self._plain.linear(out, residual, x, matrix, bias)


def _matrix(matrix: DeviceMatrix, bias: DeviceArray | None) -> tuple[Argument, ...]:
    return (
        pointer(address(matrix.places)),
        pointer(matrix.array.pointer),
        pointer(address(bias)),
    )


def _at_once(tokens: int) -> Iterable[slice]:
    """Rows of tokens that a kernel takes at once."""
    return (slice(at, min(at + AT_ONCE, tokens)) for at in range(0, tokens, AT_ONCE))


def _made_for(tokens: int) -> int:
    """Tokens of the smallest kernel that takes these."""
    return next(most for most in RINGS if tokens <= most)
