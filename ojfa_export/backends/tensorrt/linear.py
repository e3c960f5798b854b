"""Launching the matrix-vector kernels of a decode step (engines/kernels/linear.cu)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Argument, Kernels, integer, number, pointer

# Of a step in these kernels; with more, tensor cores are faster (tiled.py, bench/NOTES.md).
MOST_TOKENS = 2
# (A small model's steps of one token are the tensor cores' too: faster where the norm is no kernel
# of its own, and a token gets the same whatever is checked beside it.)
# As in the kernel: threads and warps of a block. A warp takes a row of the matrix, or two.
THREADS, WARPS = 512, 16
# Thread blocks on a multiprocessor: measured (bench/NOTES.md).
RESIDENT = 1


@dataclass(frozen=True)
class Norm:
    """A norm of the inputs: weight and bias, or none for x / rms(x)."""

    weight: DeviceArray | None
    bias: DeviceArray | None
    epsilon: float

    def arguments(self, hidden: DeviceArray) -> tuple[Argument, ...]:
        """Of a kernel that normalises `hidden`."""
        weight, bias = (address(each) for each in (self.weight, self.bias))
        return pointer(hidden.pointer), pointer(weight), pointer(bias), number(self.epsilon)


class LinearKernels:
    """Products with matrices [outputs, columns], columns a multiple of a 16-byte load.

    Args:
        device: Where they run.
        kernels: Compiled for the matrices' precision.
        element_bytes: Of that precision.
    """

    def __init__(self, device: Device, kernels: Kernels, element_bytes: int) -> None:
        self._device, self._kernels, self._bytes = device, kernels, element_bytes

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = norm(hidden) matrix^T + bias."""
        outputs, columns = matrix.shape
        arguments = (
            pointer(out.pointer),
            *norm.arguments(hidden),
            integer(hidden.shape[-1]),
            *_matrix(matrix, bias),
            integer(columns),
            integer(outputs),
        )
        self._launch("norm_linear", len(hidden), columns, outputs, arguments)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """inner [tokens, width] = the MLP's activated (and gated) products with norm(hidden)."""
        outputs, columns = matrix.shape
        arguments = (
            pointer(inner.pointer),
            *norm.arguments(hidden),
            *_matrix(matrix, bias),
            integer(columns),
            integer(inner.shape[-1]),
        )
        self._launch("norm_up", len(hidden), columns, outputs, arguments)

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = residual + x matrix^T + bias; out may be the residual."""
        outputs, columns = matrix.shape
        arguments = (
            pointer(out.pointer),
            pointer(address(residual)),
            pointer(x.pointer),
            *_matrix(matrix, bias),
            integer(columns),
            integer(outputs),
        )
        self._launch("linear", len(x), columns, outputs, arguments)

    def _launch(
        self, kind: str, tokens: int, columns: int, outputs: int, arguments: tuple[Argument, ...]
    ) -> None:
        blocks = math.ceil(outputs / WARPS)
        self._kernels.launch(
            f"{kind}_{tokens}",
            (min(blocks, RESIDENT * self._device.multiprocessors), 1, 1),
            (THREADS, 1, 1),
            arguments,
            # The inputs; for a norm a token's hidden states and the norm's weight beside them.
            shared_bytes=columns * (tokens * self._bytes + (0 if kind == "linear" else 8)),
            overlapping=True,
        )


def _matrix(matrix: DeviceArray, bias: DeviceArray | None) -> tuple[Argument, Argument]:
    return pointer(matrix.pointer), pointer(address(bias))


def address(array: DeviceArray | None) -> int | None:
    """Of what may not be there."""
    return None if array is None else array.pointer
