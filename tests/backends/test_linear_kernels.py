"""Matrix-vector products of a small model's few tokens against float64, run on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from test_tiled_kernels import EPSILON, KINDS, Cpu, CpuArray, arrays

SOURCES = ("activation.cuh", "linear.cu")


@pytest.fixture(scope="module", params=KINDS)
def compiled(request, driver, tmp_path_factory):
    from ojfa_export.backends.tensorrt.linear import LinearKernels

    kind, directory = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    macros = {**kind.macros(), "HEADS": 1, "HEAD_DIM": 16}
    return kind, LinearKernels(Cpu(), CpuKernels("linear.cpp", SOURCES, macros, directory), 2)


# Less than one load of every lane; two features of a thread, and a last thread with one.
@pytest.mark.parametrize(("tokens", "columns", "outputs"), [(3, 24, 7), (8, 576, 40), (3, 1024, 5)])
def test_products(compiled, rng, tokens, columns, outputs):
    from ojfa_export.backends.tensorrt.linear import Norm

    kind, linear = compiled
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), outputs, columns)
    x = kind.numbers(rng, 1.0, tokens, columns)
    hidden, residual, bias, weight, shift = arrays(
        rng, (tokens, columns), (tokens, outputs), (outputs,), (columns,), (columns,)
    )
    exact = matrix.array.astype(np.float64).T
    out = CpuArray(np.full((tokens, outputs), np.nan, np.float32))
    linear.norm_linear(out, hidden, Norm(weight, shift, EPSILON), matrix, bias)
    normed = kind.normed(hidden.array, weight.array, shift.array)
    kind.check(out.array, normed @ exact + bias.array)
    linear.linear(out, residual, x, matrix, bias)
    kind.check(out.array, residual.array + x.array.astype(np.float64) @ exact + bias.array)


@pytest.mark.parametrize(("tokens", "columns", "width"), [(3, 24, 5), (8, 576, 20)])
def test_activated_products(compiled, rng, tokens, columns, width):
    from ojfa_export.backends.tensorrt.linear import Norm

    kind, linear = compiled
    outputs = width * (2 if kind.gated else 1)
    matrix = kind.numbers(rng, 1 / math.sqrt(columns), outputs, columns)
    hidden, bias, weight, shift = arrays(rng, (tokens, columns), (outputs,), (columns,), (columns,))
    inner = CpuArray(np.full((tokens, width), np.nan, kind.dtype))
    linear.norm_up(inner, hidden, Norm(weight, shift, EPSILON), matrix, bias)
    y = kind.normed(hidden.array, weight.array, shift.array) @ matrix.array.astype(np.float64).T
    y = y + bias.array
    expected = y[:, :width] / (1 + np.exp(-y[:, :width]))
    kind.check(inner.array, expected * y[:, width:] if kind.gated else expected)
