from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import MOMENTS_RELATIVE

from ojfa_export.shortcuts.moments import Moments


def assert_equals_two_pass(moments: Moments, x: np.ndarray, y: np.ndarray) -> None:
    x, y = x.astype(np.float64), y.astype(np.float64)
    cx, cy = x - x.mean(axis=0), y - y.mean(axis=0)
    assert moments.count == len(x)
    expected = {
        "mean_x": x.mean(axis=0),
        "mean_y": y.mean(axis=0),
        "xx": cx.T @ cx,
        "xy": cx.T @ cy,
        "yy": (cy**2).sum(axis=0),
    }
    for name, value in expected.items():
        difference = np.abs(getattr(moments, name) - value).max()
        assert difference <= MOMENTS_RELATIVE * np.abs(value).max(), name


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_any_split_into_chunks_gives_the_two_pass_moments(seed, cuts, dtype):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(3, 2, size=(61, 5)).astype(dtype) for _ in range(2))
    moments = Moments(5)
    edges = [0, *sorted(cuts), 61]
    for start, stop in itertools.pairwise(edges):
        moments.update(x[start:stop], y[start:stop])
    assert_equals_two_pass(moments, x, y)


def test_more_rows_than_one_internal_chunk(rng):
    x, y = rng.normal(size=(2, 2500, 4))
    moments = Moments(4)
    moments.update(x, y)
    assert_equals_two_pass(moments, x, y)


def test_large_means_do_not_swallow_small_variances(rng):
    x, y = rng.normal(size=(2, 3000, 3)) + 1e7
    moments = Moments(3)
    for start in range(0, 3000, 100):
        moments.update(x[start : start + 100], y[start : start + 100])
    variance = np.diagonal(moments.xx) / moments.count
    np.testing.assert_allclose(variance, x.var(axis=0), rtol=1e-7)


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3, 5), (3, 5)), ((4,), (4,))])
def test_rows_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"expected \[n, 4\]"):
        Moments(4).update(np.zeros(shapes[0]), np.zeros(shapes[1]))
