"""Launching the products of a step with a few tokens (engines/kernels/tiled_linear.cu)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Argument, Kernels, integer, pointer
from ojfa_export.backends.tensorrt.linear import Norm, address
from ojfa_export.models.spec import ModelSpec

MOST_TILED_TOKENS = 16
# As in the kernels: threads and warps of a block, rows of a tile, columns of a span.
THREADS, WARPS, TILE, SPAN = 512, 16, 16, 64
# Bytes beyond the inputs of a token in shared memory.
SHIFT = 64
# Of a token's sums, of a warp.
SUMS_BYTES = 4 * (TILE + 4)


class TiledKernels:
    """Products in fp16 or bf16 with matrices [outputs, columns], columns a multiple of 8.

    As `LinearKernels`, for as many tokens as `most_tokens` says of the model and the device.

    Args:
        device: Where they run.
        arrays: Makes arrays there.
        kernels: Compiled for that precision.
        dtype: Of that precision.
        columns: Of the matrices that multiply what is normalised.
    """

    def __init__(
        self,
        device: Device,
        arrays: DeviceArrays,
        kernels: Kernels,
        dtype: np.dtype[Any],
        columns: int,
    ) -> None:
        self._device, self._kernels = device, kernels
        self._normed = arrays.lasting((MOST_TILED_TOKENS, columns), dtype)

    def norm_linear(
        self,
        out: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """out [tokens, outputs] = norm(hidden) matrix^T + bias."""
        self.linear(out, None, self._norm(hidden, norm), matrix, bias)

    def norm_up(
        self,
        inner: DeviceArray,
        hidden: DeviceArray,
        norm: Norm,
        matrix: DeviceArray,
        bias: DeviceArray | None,
    ) -> None:
        """inner [tokens, width] = the MLP's activated (and gated) products with norm(hidden)."""
        arguments = (
            pointer(inner.pointer),
            pointer(self._norm(hidden, norm).pointer),
            *(pointer(matrix.pointer), pointer(address(bias))),
            *map(integer, (matrix.shape[1], inner.shape[-1])),
        )
        self._launch("tiled_up", len(inner), matrix, arguments)

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
            *(pointer(out.pointer), pointer(address(residual)), pointer(x.pointer)),
            *(pointer(matrix.pointer), pointer(address(bias))),
            *map(integer, (columns, outputs)),
        )
        self._launch("tiled_linear", len(out), matrix, arguments)

    def _norm(self, hidden: DeviceArray, norm: Norm) -> DeviceArray:
        tokens, width = hidden.shape
        result = self._normed[:tokens]
        self._kernels.launch(
            "normalize",
            (tokens, 1, 1),
            (THREADS, 1, 1),
            (
                pointer(result.pointer),
                *norm.arguments(hidden),
                *map(integer, (width, result.shape[1])),
            ),
            overlapping=True,
        )
        return result

    def _launch(
        self, kind: str, tokens: int, matrix: DeviceArray, arguments: tuple[Argument, ...]
    ) -> None:
        outputs, columns = matrix.shape
        blocks = self._device.multiprocessors
        shared = self._device.shared_bytes
        pass_spans = spans_of_a_pass(tokens, outputs, columns, blocks, shared)
        assert pass_spans is not None
        self._kernels.launch(
            f"{kind}_{groups_of(tokens) * 8}",
            (min(math.ceil(outputs / TILE), blocks), 1, 1),
            (THREADS, 1, 1),
            (*arguments, integer(tokens), integer(pass_spans)),
            shared_bytes=_shared_bytes(tokens, outputs, columns, blocks, pass_spans),
            overlapping=True,
        )


def matrix_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """[outputs, columns] of a model's matrices: of a block, and the head."""
    width = spec.heads * spec.head_dim
    return [
        (width + 2 * spec.kv_heads * spec.head_dim, spec.hidden_size),
        (spec.hidden_size, width),
        (spec.intermediate_size * (2 if spec.gated else 1), spec.hidden_size),
        (spec.hidden_size, spec.intermediate_size),
        (spec.vocab_size, spec.hidden_size),
    ]


def most_tokens(shapes: Iterable[tuple[int, int]], blocks: int, shared: int) -> int:
    """How many tokens at once find room in shared memory, whatever the matrix; 0 for none.

    Args:
        shapes: Of the matrices, [outputs, columns].
        blocks: Multiprocessors, each with one thread block.
        shared: Bytes that a thread block may have.
    """
    matrices = list(shapes)
    fitting = (
        tokens
        for tokens in range(MOST_TILED_TOKENS, 0, -1)
        if all(spans_of_a_pass(tokens, *each, blocks, shared) for each in matrices)
    )
    return next(fitting, 0)


def spans_of_a_pass(
    tokens: int, outputs: int, columns: int, blocks: int, shared: int
) -> int | None:
    """Columns, in spans, of which the inputs find room at once: all, or equal parts.

    None where not even those of a span for each warp do.

    Args:
        tokens: Of the step.
        outputs: Rows of the matrix.
        columns: Of the matrix.
        blocks: Multiprocessors, each with one thread block.
        shared: Bytes that a thread block may have.
    """
    spans = math.ceil(columns / SPAN)
    for passes in range(1, spans // WARPS + 2):
        each = min(spans, math.ceil(spans / passes / WARPS) * WARPS)
        if _shared_bytes(tokens, outputs, columns, blocks, each) <= shared:
            return each
    return None


def _shared_bytes(tokens: int, outputs: int, columns: int, blocks: int, pass_spans: int) -> int:
    """Inputs of a pass, and sums: of two tiles, or of all that a thread block has."""
    spans = math.ceil(columns / SPAN)
    inputs = 2 * SPAN * min(pass_spans, spans) + SHIFT
    tiles = math.ceil(outputs / TILE)
    buffers = 2 if pass_spans >= spans else math.ceil(tiles / blocks)
    return tokens * inputs + buffers * WARPS * groups_of(tokens) * 8 * SUMS_BYTES


def groups_of(tokens: int) -> int:
    """Groups of eight tokens, of a product."""
    return math.ceil(tokens / 8)
