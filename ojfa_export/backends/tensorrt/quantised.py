"""Launching products with quantised matrices (engines/kernels/quantised_*.cu)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Argument, Kernels, integer, pointer
from ojfa_export.backends.tensorrt.layout import LAYOUT_THREADS
from ojfa_export.backends.tensorrt.linear import Norm, address
from ojfa_export.backends.tensorrt.matrices import DeviceMatrix, Matrix
from ojfa_export.backends.tensorrt.products import Products, ProductsWith
from ojfa_export.backends.tensorrt.quantised_room import (
    BATCH_WARPS,
    FEW_WARPS,
    QuantisedShape,
    Room,
    made_for,
)
from ojfa_export.bundle.weight_format import WeightFormat

# Tokens of a step in these kernels; with more a library multiplies, and reading the weights takes
# less than turning them into elements.
MOST_QUANTISED_TOKENS = 96
NORM_THREADS, GATHER_THREADS = 512, 256


class QuantisedKernels:
    """Products with quantised matrices, in fp16 or bf16; see `Products`.

    Args:
        device: Where they run.
        arrays: Makes arrays there.
        kernels: Compiled for that precision and the format.
        form: What matrices are stored as.
        dtype: Of the precision.
        shapes: Of the model's matrices.
        width: Features that are normalised.
    """

    def __init__(
        self,
        device: Device,
        arrays: DeviceArrays,
        kernels: Kernels,
        form: WeightFormat,
        dtype: np.dtype[Any],
        shapes: Collection[QuantisedShape],
        width: int,
    ) -> None:
        self._kernels, self._multiprocessors = kernels, device.multiprocessors
        room = Room(device, form)
        self._few, self._batch, self._most = cache(room.few), cache(room.batch), room.most_tokens()
        self._normed = arrays.lasting((MOST_QUANTISED_TOKENS, width), dtype)
        columns = max((shape.columns for shape in shapes), default=0)
        self._gathered = arrays.lasting((1, MOST_QUANTISED_TOKENS * columns), dtype)

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = norm(hidden) matrix^T + bias."""
        if not self._normed_by_itself("norm_quantised_linear", out, hidden, norm, matrix, bias):
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
        if self._normed_by_itself("norm_quantised_up", inner, hidden, norm, matrix, bias):
            return
        x = self._in_order(self._norm(hidden, norm), matrix)
        for rows in self._at_once(len(inner)):
            out = (pointer(inner[rows].pointer),)
            self._launch_batch("quantised_batch_up", out, x[rows], matrix, bias, inner.shape[-1])

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = residual + x matrix^T + bias; out may be the residual."""
        tokens, columns = x.shape
        shared = self._few(_shape(matrix), tokens)
        if shared is not None:
            arguments = (
                *map(pointer, (out.pointer, address(residual), x.pointer, address(matrix.places))),
                *_stored(matrix, bias),
                *map(integer, (columns, len(matrix), tokens)),
            )
            self._put("quantised_linear", matrix, FEW_WARPS, shared, arguments)
            return
        x = self._in_order(x, matrix)
        for rows in self._at_once(tokens):
            added = None if residual is None else residual[rows]
            outs = (pointer(out[rows].pointer), pointer(address(added)))
            self._launch_batch("quantised_batch_linear", outs, x[rows], matrix, bias, len(matrix))

    def _at_once(self, tokens: int) -> Iterable[slice]:
        """Rows of tokens that a kernel takes at once."""
        most = self._most
        return (slice(at, min(at + most, tokens)) for at in range(0, tokens, most))

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

    def _in_order(self, x: DeviceArray, matrix: DeviceMatrix) -> DeviceArray:
        """x with its columns as the matrix has them."""
        if matrix.order is None:
            return x
        tokens, columns = x.shape
        result = self._gathered.reshape(tokens, columns)
        self._kernels.launch(
            "gather_columns",
            (tokens, 1, 1),
            (GATHER_THREADS, 1, 1),
            (*map(pointer, (result.pointer, x.pointer, matrix.order.pointer)), integer(columns)),
            overlapping=True,
        )
        return result

    def _normed_by_itself(
        self,
        kernel: str,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
    ) -> bool:
        """Launches a product that normalises its inputs, where one is made for as many."""
        tokens, width = hidden.shape
        shared = self._few(_shape(matrix), tokens, normed=True)
        if shared is None:
            return False
        arguments = (
            pointer(out.pointer),
            *norm.arguments(hidden),
            *(integer(width), pointer(address(matrix.places))),
            *_stored(matrix, bias),
            *map(integer, (matrix.shape[1], out.shape[-1], tokens)),
        )
        self._put(kernel, matrix, FEW_WARPS, shared, arguments)
        return True

    def _launch_batch(
        self,
        kind: str,
        outs: tuple[Argument, ...],
        x: DeviceArray,
        matrix: DeviceMatrix,
        bias: DeviceArray | None,
        width: int,
    ) -> None:
        tokens, columns = x.shape
        together, shared = self._batch(_shape(matrix), tokens)
        arguments = (
            *(*outs, pointer(x.pointer)),
            *_stored(matrix, bias),
            *map(integer, (columns, width, tokens, together)),
        )
        made = made_for(tokens)
        self._put(f"{kind}_{made}", matrix, BATCH_WARPS[made], shared, arguments)

    def _put(
        self,
        kernel: str,
        matrix: DeviceMatrix,
        warps: int,
        shared: int,
        arguments: tuple[Argument, ...],
    ) -> None:
        self._kernels.launch(
            kernel,
            (min(matrix.tiles, self._multiprocessors), 1, 1),
            (32 * warps, 1, 1),
            arguments,
            shared_bytes=shared,
            overlapping=True,
        )


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


def _stored(matrix: DeviceMatrix, bias: DeviceArray | None) -> tuple[Argument, ...]:
    return pointer(matrix.array.pointer), pointer(address(bias))


def _shape(matrix: DeviceMatrix) -> QuantisedShape:
    return QuantisedShape(*matrix.shape, matrix.paired)
