"""Launching the products of a small model's step (engines/kernels/narrow_linear.cu)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Argument, Kernels, integer, pointer
from ojfa_export.backends.cuda.sources import SMALL_WIDTH
from ojfa_export.backends.tensorrt.linear import Norm, address
from ojfa_export.backends.tensorrt.tiled import SHIFT, SPAN, TiledKernels, groups_of

# As in the kernels: rows of a tile, of gates and of what they multiply half each; floats from a
# token's sums, of a warp, to the next token's; warps of a thread block; tiles at most after which
# those wait for one another, by groups of eight tokens.
TILE = 8
SUMS = TILE + 4
WARPS = 12
BATCH = {1: 4, 2: 2}
# Elements of a matrix at most: offsets are of 32 bits.
MOST_ELEMENTS = 1 << 31


class NarrowKernels(TiledKernels):
    """As `TiledKernels`, for a small model: norms are part of products, where they find room."""

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """See `TiledKernels`."""
        shared = self._room(matrix, hidden)
        if shared is None:
            super().norm_linear(out, hidden, norm, matrix, bias)
            return
        arguments = self._normed_arguments(out, hidden, norm, matrix, bias)
        self._launch_narrow("norm_narrow_linear", len(out), matrix, arguments, shared)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """See `TiledKernels`."""
        shared = self._room(matrix, hidden)
        if shared is None:
            super().norm_up(inner, hidden, norm, matrix, bias)
            return
        arguments = self._normed_arguments(inner, hidden, norm, matrix, bias)
        self._launch_narrow("norm_narrow_up", len(inner), matrix, arguments, shared)

    def linear(
        self,
        out: DeviceArray,
        residual: DeviceArray | None,
        x: DeviceArray,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """See `TiledKernels`."""
        shared = self._room(matrix, x, normed=False)
        if shared is None:
            super().linear(out, residual, x, matrix, bias)
            return
        outputs, columns = matrix.shape
        arguments = (
            *(pointer(out.pointer), pointer(address(residual)), pointer(x.pointer)),
            *(pointer(matrix.pointer), pointer(address(bias))),
            *map(integer, (columns, outputs, len(x))),
        )
        self._launch_narrow("narrow_linear", len(x), matrix, arguments, shared)

    def _room(self, matrix: DeviceArray, inputs: DeviceArray, *, normed: bool = True) -> int | None:
        """Bytes of shared memory for inputs that are normalised or not; None for too many."""
        tokens, width = inputs.shape
        outputs, columns = matrix.shape
        if outputs * columns > MOST_ELEMENTS or (normed and (width > SMALL_WIDTH or width % 4)):
            return None
        spans = math.ceil(columns / SPAN)
        staged = tokens * (2 * SPAN * spans + SHIFT)
        groups = groups_of(tokens)
        sums = 2 * self._batch(groups, outputs) * WARPS * groups * 8 * 4 * SUMS
        # The norm's weight and bias, hidden states, and mean and scale of each.
        norms = 4 * ((2 + tokens) * width + 2 * tokens) if normed else 0
        shared = staged + norms + sums
        return shared if shared <= self._device.shared_bytes else None

    def _blocks(self, outputs: int) -> int:
        """Thread blocks that share a matrix of so many rows."""
        return min(math.ceil(outputs / TILE), self._device.multiprocessors)

    def _batch(self, groups: int, outputs: int) -> int:
        """Tiles of a thread block after which its warps wait for one another."""
        tiles = math.ceil(outputs / TILE)
        return min(BATCH[groups], math.ceil(tiles / self._blocks(outputs)))

    def _normed_arguments(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> tuple[Argument, ...]:
        tokens, width = hidden.shape
        return (
            *(pointer(out.pointer), *norm.arguments(hidden), integer(width)),
            *(pointer(matrix.pointer), pointer(address(bias))),
            *map(integer, (matrix.shape[1], out.shape[-1], tokens)),
        )

    def _launch_narrow(
        self,
        kind: str,
        tokens: int,
        matrix: DeviceArray,
        arguments: tuple[Argument, ...],
        shared: int,
    ) -> None:
        groups, outputs = groups_of(tokens), matrix.shape[0]
        self._kernels.launch(
            f"{kind}_{groups * 8}",
            (self._blocks(outputs), 1, 1),
            (32 * WARPS, 1, 1),
            (*arguments, integer(self._batch(groups, outputs))),
            shared_bytes=shared,
            overlapping=True,
        )


def on_tensor_cores(
    device: Device,
    arrays: DeviceArrays,
    kernels: Kernels,
    dtype: np.dtype[Any],
    hidden_size: int,
) -> TiledKernels:
    """The kernels for a few tokens of a model; see `TiledKernels`."""
    kind = NarrowKernels if hidden_size <= SMALL_WIDTH else TiledKernels
    return kind(device, arrays, kernels, dtype, hidden_size)
