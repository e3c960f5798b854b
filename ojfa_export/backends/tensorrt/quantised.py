"""Launching products with quantised matrices (engines/kernels/quantised_linear.cu)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
    NORMED,
    QuantisedShape,
    made_for,
    rooms_of,
    warps_of,
)
from ojfa_export.bundle.weight_format import WeightFormat

# Tokens of a step in these kernels; with more a library multiplies, and reading the weights takes
# less than turning them into elements.
MOST_QUANTISED_TOKENS = 48
NORM_THREADS = 512


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
        self._kernels, self._normed = kernels, arrays.lasting((MOST_QUANTISED_TOKENS, width), dtype)
        self._rooms = rooms_of(device, form, shapes, width)
        self._multiprocessors = device.multiprocessors

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
        for rows in self._at_once(len(inner)):
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
        for rows in self._at_once(len(x)):
            added = None if residual is None else residual[rows]
            arguments = (pointer(out[rows].pointer), pointer(address(added)))
            self._launch("quantised_linear", arguments, x[rows], matrix, bias, matrix.shape[0])

    def _at_once(self, tokens: int) -> Iterable[slice]:
        """Rows of tokens that a kernel takes at once."""
        most = len(self._rooms)
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
        shared = self._rooms[tokens].of(_shape(matrix), normed=True).shared_bytes
        self._put(kind, matrix, warps_of(tokens), shared, arguments)

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
        room = self._rooms[tokens].of(_shape(matrix))
        arguments = (
            *results,
            pointer(x.pointer),
            *_matrix(matrix, bias),
            *map(integer, (columns, width, tokens, room.pass_steps)),
        )
        kernel = f"{kind}_{made_for(tokens)}"
        self._put(kernel, matrix, warps_of(tokens), room.shared_bytes, arguments)

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


def _matrix(matrix: DeviceMatrix, bias: DeviceArray | None) -> tuple[Argument, ...]:
    return (
        pointer(address(matrix.places)),
        pointer(matrix.array.pointer),
        pointer(address(bias)),
    )


def _shape(matrix: DeviceMatrix) -> QuantisedShape:
    return QuantisedShape(*matrix.shape, matrix.paired)
