"""Products of passes with many tokens: cuBLASLt's, between kernels of ours (around_products.cu)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.cublas import Cublas
from ojfa_export.backends.cuda.kernels import Kernels, integer, pointer
from ojfa_export.backends.tensorrt.linear import Norm, address
from ojfa_export.backends.tensorrt.plan import PASS_TOKENS

# As in the kernels.
NORM_THREADS, ACTIVATE_THREADS, WIDE_BYTES = 512, 256, 16


class GemmProducts:
    """Products with matrices [outputs, columns], for any number of tokens; see `Products`.

    Args:
        cublas: Makes them.
        arrays: Makes arrays.
        kernels: Compiled for the matrices' precision.
        dtype: Of the matrices.
        most: Tokens of a pass at most.
    """

    def __init__(
        self,
        cublas: Cublas,
        arrays: DeviceArrays,
        kernels: Kernels,
        dtype: np.dtype[Any],
        most: int = PASS_TOKENS,
    ) -> None:
        self._cublas, self._arrays, self._kernels, self._dtype = cublas, arrays, kernels, dtype
        self._most = most
        self._kept: dict[int, DeviceArray] = {}  # by width

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = norm(hidden) matrix^T + bias."""
        self._cublas.multiply(out, self._normalize(hidden, norm, matrix.shape[1]), matrix, bias)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """inner [tokens, width] = the MLP's activated (and gated) products with norm(hidden)."""
        tokens, width = inner.shape
        products = self._room(tokens, matrix.shape[0])
        self._cublas.multiply(products, self._normalize(hidden, norm, matrix.shape[1]), matrix)
        each = ACTIVATE_THREADS * (WIDE_BYTES // self._dtype.itemsize)
        self._kernels.launch(
            "activate_products",
            (math.ceil(width / each), tokens, 1),
            (ACTIVATE_THREADS, 1, 1),
            (
                *(pointer(inner.pointer), pointer(products.pointer), pointer(address(bias))),
                integer(width),
            ),
            overlapping=True,
        )

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = residual + x matrix^T + bias; out may be the residual."""
        self._cublas.multiply(out, x, matrix, bias, residual)

    def _normalize(self, hidden: DeviceArray, norm: Norm, columns: int) -> DeviceArray:
        """norm(hidden) [tokens, columns] in the matrices' dtype."""
        tokens, width = hidden.shape
        result = self._room(tokens, columns)
        self._kernels.launch(
            "normalize",
            (tokens, 1, 1),
            (NORM_THREADS, 1, 1),
            (pointer(result.pointer), *norm.arguments(hidden), integer(width), integer(columns)),
            overlapping=True,
        )
        return result

    def _room(self, tokens: int, width: int) -> DeviceArray:
        """An array [tokens, width] that nothing else is in, for as many tokens as a pass has."""
        if width not in self._kept:
            self._kept[width] = self._arrays.lasting((self._most, width), self._dtype)
        return self._kept[width][:tokens]
