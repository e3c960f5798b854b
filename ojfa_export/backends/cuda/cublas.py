"""Matrix products by cuBLASLt, NVIDIA's library: what its C interface needs, by ctypes.

The library orders matrices by columns, so that a row-major [rows, columns] is its [columns, rows].
Names and numbers are those of cublasLt.h, the same in CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.failures import NO_CUBLAS
from ojfa_export.errors import BackendError
from ojfa_export.models.bfloat16 import BFLOAT16

VERSIONS = (13, 12)
# CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF.
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2, BFLOAT16: 14}
COMPUTE_32F = 68
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8  # of a product
EPILOGUE_BIAS = 4
MOST_WORKSPACE = 1  # of what is preferred
WORKSPACE_BYTES = 32 << 20  # as NVIDIA recommends for compute capability 9.0
# Ways to make a product that are in use; each takes some hundred bytes.
MOST_PLANS = 4096


class Algorithm(ctypes.Structure):
    """A cublasLtMatmulAlgo_t: how to make a product. Good for the library's version alone."""

    _fields_ = (("data", ctypes.c_uint64 * 8),)

    def hex(self) -> str:
        """As text."""
        return bytes(self).hex()

    @classmethod
    def from_hex(cls, text: str) -> Algorithm:
        """Of text.

        Raises:
            ValueError: It is none.
        """
        return cls.from_buffer_copy(bytes.fromhex(text))


class _Heuristic(ctypes.Structure):
    """A cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Product:
    """out [tokens, outputs] = x [tokens, columns] matrix [outputs, columns]^T, and what is added.

    Attributes:
        tokens: Rows of x.
        outputs: Rows of the matrix.
        columns: Of both.
        element: dtype of x and the matrix.
        result: dtype of out, and of what is added.
        bias: Whether a bias [outputs] is added.
    """

    tokens: int
    outputs: int
    columns: int
    element: np.dtype[Any]
    result: np.dtype[Any]
    bias: bool


def cublas_version(device: Device) -> str | None:
    """The library's version, for example "13.1"; None where it isn't there."""
    try:
        version = _version(_library_for(device))
    except BackendError:
        return None
    return f"{version // 10_000}.{version // 100 % 100}"


class Cublas:
    """Matrix products on a device's stream.

    Args:
        device: The GPU.

    Attributes:
        choose: How to make a product, where that is known; None leaves it to the library. To be set
            before the first product.

    Raises:
        BackendError: The library isn't there, or doesn't work.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._library = _library_for(device)
        self._handle = ctypes.c_void_p()
        self._check(self._library.cublasLtCreate(ctypes.byref(self._handle)))
        self._workspace = DeviceArrays(device).lasting((1, WORKSPACE_BYTES), np.uint8)
        self._plan = lru_cache(MOST_PLANS)(self._new_plan)
        self.choose: Callable[[Product], Algorithm | None] = lambda product: None

    @property
    def version(self) -> int:
        """Of the library, for example 130100."""
        return _version(self._library)

    def multiply(
        self,
        out: DeviceArray,
        x: DeviceArray,
        matrix: DeviceArray,
        bias: DeviceArray | None = None,
        added: DeviceArray | None = None,
        algorithm: Algorithm | None = None,
    ) -> None:
        """out [tokens, outputs] = added + x [tokens, columns] matrix^T + bias.

        Args:
            out: fp32, or of the matrix's dtype; may be what is added.
            x: Of the matrix's dtype.
            matrix: [outputs, columns].
            bias: [outputs], of out's dtype.
            added: As out.
            algorithm: How; None for `choose`, or else what the library recommends.
        """
        tokens, columns = x.shape
        product = Product(
            tokens, matrix.shape[0], columns, matrix.dtype, out.dtype, bias is not None
        )
        plan = self._plan(product)
        if bias is not None:
            plan.set(BIAS_POINTER, ctypes.c_void_p(bias.pointer))
        one, factor = ctypes.c_float(1), ctypes.c_float(0 if added is None else 1)
        self._check(
            self._library.cublasLtMatmul(
                self._handle,
                plan.product,
                ctypes.byref(one),
                ctypes.c_void_p(matrix.pointer),
                plan.matrix,
                ctypes.c_void_p(x.pointer),
                plan.x,
                ctypes.byref(factor),
                ctypes.c_void_p((added or out).pointer),
                plan.out,
                ctypes.c_void_p(out.pointer),
                plan.out,
                ctypes.byref(algorithm or plan.algorithm),
                ctypes.c_void_p(self._workspace.pointer),
                ctypes.c_size_t(WORKSPACE_BYTES),
                ctypes.c_void_p(int(self._device.stream)),
            )
        )

    def algorithms(self, product: Product, most: int) -> list[Algorithm]:
        """Ways to make a product, the library's favourite first."""
        return self._heuristics(_Plan(self._library, product), most)

    def _new_plan(self, product: Product) -> _Plan:
        plan = _Plan(self._library, product)
        chosen = self.choose(product)
        if chosen is None or not self._can(plan, chosen):
            chosen = self._heuristics(plan, 1)[0]
        plan.algorithm = chosen
        return plan

    def _can(self, plan: _Plan, algorithm: Algorithm) -> bool:
        """Whether an algorithm, measured for other numbers of tokens, makes this product."""
        result, reference = _Heuristic(), ctypes.byref
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle,
            plan.product,
            *(plan.matrix, plan.x, plan.out, plan.out),
            reference(algorithm),
            reference(result),
        )
        return not status and result.workspace <= WORKSPACE_BYTES

    def _heuristics(self, plan: _Plan, most: int) -> list[Algorithm]:
        preference, count = ctypes.c_void_p(), ctypes.c_int()
        results = (_Heuristic * most)()
        size = ctypes.c_uint64(WORKSPACE_BYTES)
        library, reference = self._library, ctypes.byref
        self._check(library.cublasLtMatmulPreferenceCreate(reference(preference)))
        try:
            self._check(
                library.cublasLtMatmulPreferenceSetAttribute(
                    preference, MOST_WORKSPACE, reference(size), ctypes.c_size_t(8)
                )
            )
            self._check(
                library.cublasLtMatmulAlgoGetHeuristic(
                    self._handle,
                    plan.product,
                    *(plan.matrix, plan.x, plan.out, plan.out),
                    preference,
                    most,
                    results,
                    reference(count),
                )
            )
        finally:
            library.cublasLtMatmulPreferenceDestroy(preference)
        found = [each.algorithm for each in results[: count.value] if not each.state]
        if not found:
            raise BackendError(f"cuBLASLt knows no way to make {plan.what}")
        return found

    def _check(self, status: int) -> None:
        _check(self._library, status)


class _Plan:
    """The descriptors of a product, and its algorithm."""

    algorithm: Algorithm

    def __init__(self, library: ctypes.CDLL, product: Product) -> None:
        self._library, self.what = library, product
        self.product = ctypes.c_void_p()
        self.matrix = self.x = self.out = ctypes.c_void_p()
        created = library.cublasLtMatmulDescCreate(ctypes.byref(self.product), COMPUTE_32F, 0)
        _check(library, created)
        self.set(TRANSPOSE_A, ctypes.c_int(1))
        if product.bias:
            self.set(EPILOGUE, ctypes.c_int(EPILOGUE_BIAS))
        element, result = TYPES[product.element], TYPES[product.result]
        self.matrix = self._layout(element, product.columns, product.outputs)
        self.x = self._layout(element, product.columns, product.tokens)
        self.out = self._layout(result, product.outputs, product.tokens)

    def set(self, attribute: int, value: ctypes.c_int | ctypes.c_void_p) -> None:
        """Sets an attribute of the product."""
        _check(
            self._library,
            self._library.cublasLtMatmulDescSetAttribute(
                self.product, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
            ),
        )

    def _layout(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        """Of a matrix by columns, one right after the other."""
        layout = ctypes.c_void_p()
        _check(
            self._library,
            self._library.cublasLtMatrixLayoutCreate(
                ctypes.byref(layout),
                kind,
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            ),
        )
        return layout

    def __del__(self) -> None:
        for layout in (self.matrix, self.x, self.out):
            if layout:
                self._library.cublasLtMatrixLayoutDestroy(layout)
        if self.product:
            self._library.cublasLtMatmulDescDestroy(self.product)


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.cublasLtGetStatusString.restype = ctypes.c_char_p
        text = library.cublasLtGetStatusString(status)
        raise BackendError(f"cuBLASLt: {text.decode() if text else status}")


def _version(library: ctypes.CDLL) -> int:
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return int(library.cublasLtGetVersion())


def _library_for(device: Device) -> ctypes.CDLL:
    return _library(int(device.driver_version.partition(".")[0]))


@cache
def _library(newest: int) -> ctypes.CDLL:
    """The library of the newest CUDA that the driver runs, of the system or of a package.

    Args:
        newest: CUDA version of the driver, without what comes after the point.

    Raises:
        BackendError: It is nowhere.
    """
    for version in (each for each in VERSIONS if each <= newest):
        with suppress(OSError):
            return ctypes.CDLL(f"libcublasLt.so.{version}")
    with suppress(ImportError, RuntimeError, OSError):
        # With cuda-python from 12.9 on: looks into NVIDIA's packages as well.
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    raise BackendError(
        "cuBLASLt, which multiplies matrices with many tokens, was not found",
        hint=NO_CUBLAS,
    )
