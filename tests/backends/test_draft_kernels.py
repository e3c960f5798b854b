"""A draft layer's own kernels against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from elements import DTYPES, macros
from kernels_on_cpu import CpuKernels

THREADS = 256  # as in the kernels
EPSILON = 1e-5
ROUNDING = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-6}  # relative


@pytest.fixture(scope="module", params=DTYPES)
def compiled(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    kernels = CpuKernels("draft.cpp", ("draft.cu",), macros(request.param), directory)
    return request.param, kernels


def launch(kernels, name, grid, threads, *arguments) -> None:
    """Arrays go by their address, whole numbers and others by value."""
    kinds = {int: ctypes.c_int, float: ctypes.c_float}
    given = [
        (each.ctypes.data, ctypes.c_void_p)
        if isinstance(each, np.ndarray)
        else (each or 0, kinds.get(type(each), ctypes.c_void_p))
        for each in arguments
    ]
    kernels.launch(name, (*grid, 1), (threads, 1, 1), given)


@pytest.mark.parametrize("width", [20, 300])
def test_states_side_by_side(compiled, rng, width):
    precision, kernels = compiled
    depths, slots, capacity = 3, 2, 5
    kept = rng.standard_normal((depths, slots, capacity, width)).astype(np.float32)
    positions, sequences = np.array([[4, 0, 2, 0], [1, 0, 1, -1]], np.int32)
    x = np.full((4, depths * width), np.nan, DTYPES[precision])
    out = np.full(4, -7, np.int32)
    launch(
        kernels,
        "side_by_side",
        (4, depths),
        THREADS,
        *(x, kept, positions, out, sequences, slots, capacity, width),
    )
    assert out.tolist() == positions.tolist()
    expected = kept[:, sequences, positions].swapaxes(0, 1).reshape(4, -1)
    expected[3] = 0
    np.testing.assert_allclose(x.astype(np.float64), expected, rtol=ROUNDING[precision], atol=1e-7)


@pytest.mark.parametrize("width", [20, 300])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_layer_sees(compiled, rng, width, named, in_place):
    precision, kernels = compiled
    tokens, vocabulary, stride, steps = 3, 11, 4, 2
    element = DTYPES[precision]
    table = rng.standard_normal((vocabulary, width)).astype(element)
    norms = rng.standard_normal((2, width)).astype(np.float32)
    memory = rng.standard_normal((tokens, width)).astype(np.float32)
    hidden = memory if in_place else np.full((tokens, width), np.nan, np.float32)
    names = np.array([1, 4, 6, 10], np.int32)
    ids = np.array([3, 0, 2], np.int32)
    seen = np.full((tokens, 2, width), np.nan, element)
    written = np.full(tokens * stride, -7, np.int32)
    positions, moved = np.array([7, 0, 30], np.int32), np.full(tokens, -7, np.int32)
    chosen = names[ids] if named else ids
    launch(
        kernels,
        "see",
        (tokens, 2),
        THREADS,
        *(seen, hidden, memory, table, norms[0], norms[1], EPSILON, ids),
        *(names if named else None, written if named else None, stride),
        *(positions, moved, steps, width),
    )
    assert moved.tolist() == (positions + steps).tolist()
    if named:
        assert written[::stride].tolist() == chosen.tolist()
        assert (written.reshape(tokens, stride)[:, 1:] == -7).all()
    np.testing.assert_array_equal(hidden, memory)
    both = np.stack([table[chosen].astype(np.float64), memory.astype(np.float64)], axis=1)
    expected = both / np.sqrt((both**2).mean(axis=-1, keepdims=True) + EPSILON) * norms
    np.testing.assert_allclose(
        seen.astype(np.float64), expected, rtol=10 * ROUNDING[precision], atol=1e-6
    )


def test_tokens_are_named(compiled):
    _, kernels = compiled
    names, ids = np.array([5, 6, 9], np.int32), np.array([2, 0], np.int32)
    written = np.full(6, -7, np.int32)
    launch(kernels, "name_tokens", (1, 1), 2, written, ids, names, 3)
    assert written.tolist() == [9, -7, -7, 5, -7, -7]
    launch(kernels, "name_tokens", (1, 1), 2, written, ids, None, 3)
    assert written.tolist() == [2, -7, -7, 0, -7, -7]
