"""The input of a block behind an exit against float64, run on the CPU (cuda_on_cpu)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from elements import macros
from kernels_on_cpu import CpuKernels

THREADS = 256  # as in the kernel


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """States are fp32 in every precision."""
    directory = tmp_path_factory.mktemp("exit_block")
    return CpuKernels("exit_block.cpp", ("exit_block.cu",), macros("fp32"), directory)


@pytest.mark.parametrize("width", [20, 300])
@pytest.mark.parametrize("in_place", [False, True])
def test_states_are_scaled_and_shifted(kernels, rng, width, in_place):
    x = rng.standard_normal((3, width)).astype(np.float32)
    scale, shift = rng.standard_normal((2, width)).astype(np.float32)
    expected = x.astype(np.float64) * scale + shift
    y = x if in_place else np.full_like(x, np.nan)
    arrays = [(each.ctypes.data, ctypes.c_void_p) for each in (y, x, scale, shift)]
    kernels.launch("scale_and_shift", (3, 1, 1), (THREADS, 1, 1), [*arrays, (width, ctypes.c_int)])
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
