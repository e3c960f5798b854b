"""Quantising by what goes into a matrix, against the paper's recursion in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import INPUT_FACTOR_RELATIVE

from ojfa_export.backends.onnxruntime.quantise import quantise as to_the_nearest
from ojfa_export.bundle.weight_format import PACKED, WeightFormat, dequantise
from ojfa_export.graphs import gptq
from ojfa_export.graphs.input_factor import DAMPING, PANEL, InputFactor
from ojfa_export.graphs.ranges import Ranges


def form_of(group_size, *, offsets=False):
    return WeightFormat(storage="int4", group_size=group_size, zero_points=True, offsets=offsets)


def inputs_of(rng, rows, features):
    """That go together, as a model's do: a few directions and some noise."""
    directions = rng.standard_normal((max(1, features // 8), features))
    return rng.standard_normal((rows, len(directions))) @ directions + 0.3 * rng.standard_normal(
        (rows, features)
    )


def by_the_paper(columns, form, gram):
    """What numbers [inputs, outputs] stand for: H's inverse is reduced by each column done."""
    damped = gram + DAMPING * gram.diagonal().mean() * np.eye(len(gram))
    order, most = np.argsort(-gram.diagonal(), kind="stable"), (1 << form.bits) - 1
    inverse = np.linalg.inv(damped)[np.ix_(order, order)]
    left, rest = columns.astype(np.float64), inverse.copy()
    diagonal = np.empty(len(gram), np.float32)
    for at in range(len(gram)):  # a column's cost is what is left of H's inverse when it is due
        diagonal[order[at]] = np.sqrt(rest[0, 0])
        rest = rest[1:, 1:] - np.outer(rest[1:, 0], rest[0, 1:]) / rest[0, 0]
    ranges = Ranges.of(columns, form, diagonal)
    stands_for = np.empty_like(left)
    for at, column in enumerate(order):
        group = column // form.group_size
        scale, point, offset = ranges.scales[group], ranges.points[group], ranges.offsets[group]
        number = np.clip(np.rint((left[column] - offset) / scale + point), 0, most)
        stands_for[column] = (number - point) * scale + offset
        error = (left[column] - stands_for[column]) / inverse[0, 0]
        left[order[at + 1 :]] -= np.outer(inverse[0, 1:], error)
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return stands_for


@pytest.mark.parametrize("features", [1, 48, PANEL, 2 * PANEL + 76])
@pytest.mark.parametrize("scarce", [False, True])  # fewer rows than features
def test_the_factor_is_that_of_the_inverse(rng, features, scarce):
    """Found in place, panel by panel, against NumPy's inverse and Cholesky's of that."""
    x = inputs_of(rng, features // 2 + 1 if scarce else 2 * features, features)
    x *= np.exp(rng.standard_normal(features))
    factor, gram = InputFactor.of(x), x.T @ x
    order = np.argsort(-gram.diagonal(), kind="stable")
    damped = gram + DAMPING * gram.diagonal().mean() * np.eye(features)
    inverse = np.linalg.inv(damped)[np.ix_(order, order)]
    expected = np.linalg.cholesky((inverse + inverse.T) / 2).T
    upper = np.zeros_like(expected)
    for start in range(0, features, PANEL):
        panel = factor.rows(start, min(start + PANEL, features))
        upper[start : start + len(panel), start:] = panel
    np.testing.assert_array_equal(factor.order, order)
    np.testing.assert_array_equal(factor.diagonal, upper.diagonal())
    np.testing.assert_array_equal(upper, np.triu(upper))
    tolerance = INPUT_FACTOR_RELATIVE * np.abs(expected).max()
    np.testing.assert_allclose(upper, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("features", "group_size"), [(32, 16), (160, 16), (256, 128), (640, 32)])
@pytest.mark.parametrize("offsets", [False, True])
def test_numbers_are_those_of_the_paper_s_recursion(rng, features, group_size, offsets):
    form = form_of(group_size, offsets=offsets)
    x = inputs_of(rng, 3 * features, features)
    columns = rng.standard_normal((features, 20)).astype(np.float32)
    made = gptq.quantise(columns, form, InputFactor.of(x))
    assert made.packed.shape == form.shapes(features, 20)[PACKED]
    ours, theirs = dequantise(made, form).T, by_the_paper(columns, form, x.T @ x)
    # Where a weight lies within fp32's rounding of the border of two numbers, all after it differ.
    alike = np.isclose(ours, theirs, atol=1e-4).all(axis=0)
    assert alike.mean() >= 0.8
    lost = [np.linalg.norm(x @ (each - columns)) for each in (ours, theirs)]
    assert lost[0] == pytest.approx(lost[1], rel=0.05)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(2, 5),
    group_size=st.sampled_from([16, 32, 64]),
    outputs=st.integers(24, 40),  # of one the greedy way may lose
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_products_are_nearer_than_of_the_nearest_numbers(seed, groups, group_size, outputs, spread):
    rng, form = np.random.default_rng(seed), form_of(group_size)
    features = groups * group_size
    x = inputs_of(rng, 2 * features, features)
    columns = (spread * rng.standard_normal((features, outputs))).astype(np.float32)
    ours = dequantise(gptq.quantise(columns, form, InputFactor.of(x)), form).T
    nearest = dequantise(to_the_nearest(columns, form), form).T
    lost = [np.linalg.norm(x @ (each.astype(np.float64) - columns)) for each in (ours, nearest)]
    assert lost[0] < lost[1]


def test_inputs_that_are_alone_lose_no_more_than_the_nearest_numbers(rng):
    """Nothing can be made good: what is left are better ranges."""
    form = form_of(32)
    columns = rng.standard_normal((64, 30)).astype(np.float32)
    ours = dequantise(gptq.quantise(columns, form, InputFactor.of(np.eye(64))), form).T
    nearest = dequantise(to_the_nearest(columns, form), form).T
    assert np.square(ours - columns).sum() <= np.square(nearest - columns).sum()


@pytest.mark.parametrize("columns", [np.zeros((32, 3)), np.full((32, 3), -2.5), np.eye(32, 3)])
@pytest.mark.parametrize("offsets", [False, True])
def test_matrices_of_few_numbers(columns, offsets):
    form, columns = form_of(16, offsets=offsets), columns.astype(np.float32)
    made = dequantise(gptq.quantise(columns, form, InputFactor.of(np.zeros((32, 32)))), form).T
    np.testing.assert_allclose(made, columns, atol=1e-6)


def test_features_that_never_were(rng):
    """Their weights are kept as near as others'."""
    form, x = form_of(16), inputs_of(rng, 100, 48)
    x[:, 16:32] = 0
    columns = rng.standard_normal((48, 12)).astype(np.float32)
    made = dequantise(gptq.quantise(columns, form, InputFactor.of(x)), form).T
    assert np.abs(made - columns)[16:32].max() < 0.5
