from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import FIT_LOSS_RELATIVE, JUMP_FP32_RELATIVE

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.errors import CalibrationError, UsageError
from ojfa_export.shortcuts.fit import fit_levels, fit_n_njtc, rows_needed
from ojfa_export.shortcuts.fit import training_loss as loss_of
from ojfa_export.shortcuts.moments import Moments

EPS = 1e-5


def in_float64(shortcut: Shortcut, x: np.ndarray) -> np.ndarray:
    scale, shift, down, up = (
        getattr(shortcut, name).astype(np.float64) for name in ("scale", "shift", "down", "up")
    )
    return (x * scale + shift) @ down @ up


def loss_on_rows(prediction: np.ndarray, y: np.ndarray) -> float:
    return float(((prediction - y) ** 2).sum(axis=1).mean())


def least_squares_loss(x: np.ndarray, y: np.ndarray) -> float:
    with_one = np.column_stack(
        [(x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + EPS), np.ones(len(x))]
    )
    return loss_on_rows(with_one @ np.linalg.lstsq(with_one, y)[0], y)


def alternating_least_squares_loss(x, y, rank, rng, steps=3000) -> float:
    """The rank-constrained optimum found without any decomposition of moments."""
    inputs = np.column_stack([(x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + EPS), np.ones(len(x))])
    basis, triangle = np.linalg.qr(inputs)
    down = rng.normal(size=(inputs.shape[1], rank))
    for _ in range(steps):
        up = np.linalg.lstsq(inputs @ down, y)[0]
        down = np.linalg.solve(triangle, basis.T @ y @ np.linalg.pinv(up))
    return loss_on_rows(inputs @ down @ np.linalg.lstsq(inputs @ down, y)[0], y)


@pytest.mark.parametrize("residual", [False, True])
def test_loss_from_moments_is_the_loss_on_the_rows(
    paired_rows, moments_of, random_shortcut, residual
):
    x, y = paired_rows(200, 7)
    shortcut = random_shortcut(7, 3, residual=residual)
    expected = loss_on_rows(in_float64(shortcut, x) + (x if residual else 0), y)
    assert loss_of(moments_of(x, y), shortcut) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_is_as_good_as_alternating_least_squares(paired_rows, moments_of, rng, rank):
    x, y = paired_rows(300, 8)
    loss = loss_of(moments_of(x, y), fit_n_njtc(moments_of(x, y), rank, fitted_at=1))
    other = alternating_least_squares_loss(x, y, rank, rng)
    assert loss <= other * (1 + FIT_LOSS_RELATIVE)
    assert loss >= other * (1 - 1e-3)  # and it is the same problem; ALS converges slowly


def test_full_rank_is_ordinary_least_squares(paired_rows, moments_of):
    x, y = paired_rows(400, 16)
    moments = moments_of(x, y)
    shortcut = fit_n_njtc(moments, 16, fitted_at=1)
    assert loss_of(moments, shortcut) == pytest.approx(
        least_squares_loss(x, y), rel=FIT_LOSS_RELATIVE
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 9), exponent=st.floats(-4, 0.5))
def test_no_perturbation_lowers_the_loss(moments_of, seed, rank, exponent):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, 9)) * rng.uniform(0.3, 3, 9) + 5 * rng.normal(size=9)
    jump = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    y = (x - x.mean(axis=0)) @ jump + rng.normal(size=(120, 9)) + rng.normal(size=9)
    moments = moments_of(x, y)
    shortcut = fit_n_njtc(moments, rank, fitted_at=1)
    best = loss_of(moments, shortcut)

    def disturbed(array: np.ndarray) -> np.ndarray:
        noise = rng.normal(size=array.shape) * np.abs(array).mean() * 10**exponent
        return (array + noise).astype(np.float32)

    for names in (["down"], ["up"], ["shift"], ["scale"], ["down", "up", "shift"]):
        other = replace(shortcut, **{name: disturbed(getattr(shortcut, name)) for name in names})
        assert loss_of(moments, other) >= best * (1 - FIT_LOSS_RELATIVE)


def test_more_rank_never_costs_loss(paired_rows, moments_of):
    moments = moments_of(*paired_rows(200, 10))
    losses = [loss_of(moments, fit_n_njtc(moments, r, fitted_at=1)) for r in range(1, 11)]
    assert all(b <= a * (1 + FIT_LOSS_RELATIVE) for a, b in itertools.pairwise(losses))


def test_jump_that_is_narrow_is_recovered_on_new_rows(rng, moments_of):
    down, up = rng.normal(size=(12, 3)), rng.normal(size=(3, 12))
    offset = rng.normal(size=3)
    x = rng.normal(size=(500, 12)) * rng.uniform(0.2, 4, 12) + 10 * rng.normal(size=12)
    shortcut = fit_n_njtc(moments_of(x, (x @ down + offset) @ up), 3, fitted_at=1)
    new = (rng.normal(size=(50, 12)) * 3).astype(np.float32)
    expected = (new @ down + offset) @ up
    difference = np.abs(shortcut.apply(new) - expected).max()
    assert difference <= JUMP_FP32_RELATIVE * np.abs(expected).max()


def test_scale_is_batch_norms(paired_rows, moments_of):
    x, y = paired_rows(100, 6)
    shortcut = fit_n_njtc(moments_of(x, y), 2, fitted_at=1, eps=0.3)
    np.testing.assert_allclose(shortcut.scale, 1 / np.sqrt(x.var(axis=0) + 0.3), rtol=1e-6)


def test_features_that_never_vary_are_ignored(paired_rows, moments_of, rng):
    x, y = paired_rows(200, 10)
    x[:, [2, 5]] = [0.0, 1234.5]
    shortcut = fit_n_njtc(moments_of(x, y), 10, fitted_at=1)
    alive = np.delete(x, [2, 5], axis=1)
    expected = least_squares_loss(alive, y)
    assert loss_of(moments_of(x, y), shortcut) == pytest.approx(expected, rel=FIT_LOSS_RELATIVE)
    changed = x.copy()
    changed[:, [2, 5]] = rng.normal(size=(200, 2)) * 1e4
    np.testing.assert_array_equal(in_float64(shortcut, x), in_float64(shortcut, changed))


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_features_that_depend_on_each_other_do_no_harm(paired_rows, moments_of, rng, noise):
    """A direction in which only rounding varies must not be blown up to explain y."""
    x, y = paired_rows(200, 10)
    x[:, 7] = 2 * x[:, 3] - x[:, 4] + noise * rng.normal(size=200)
    shortcut = fit_n_njtc(moments_of(x, y), 9, fitted_at=1)
    assert np.abs(shortcut.down).max() < 10 * np.abs(y).max()
    expected = in_float64(shortcut, x)
    difference = np.abs(shortcut.apply(x.astype(np.float32)) - expected).max()
    assert difference <= JUMP_FP32_RELATIVE * np.abs(expected).max()
    independent = np.delete(x, 7, axis=1)
    assert loss_on_rows(expected, y) >= least_squares_loss(independent, y) * (1 - 1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_mean_in_a_direction_that_inputs_do_not_reach(rng, moments_of, rank):
    """No shift of the inputs makes this mean; the jump must still, in fp32, at little cost."""
    x = rng.normal(size=(400, 8))
    y = np.zeros((400, 8))
    y[:, 1:5] = x[:, :4] * [1.0, 0.8, 0.6, 0.4] + 0.1 * rng.normal(size=(400, 4))
    y[:, 0] = 300.0
    shortcut = fit_n_njtc(moments_of(x, y), rank, fitted_at=1)
    assert np.abs(shortcut.shift).max() < 1e3
    prediction = shortcut.apply(x.astype(np.float32))
    np.testing.assert_allclose(prediction[:, 0], 300.0, rtol=1e-5)
    if rank == 5:
        # x[:, 4:8] explain nothing, so giving up the cheapest of them costs next to nothing.
        assert loss_on_rows(prediction, y) == pytest.approx(least_squares_loss(x, y), rel=1e-2)


def test_target_of_lower_rank_than_asked(rng, moments_of):
    x = rng.normal(size=(100, 8))
    y = x[:, :2] @ rng.normal(size=(2, 8)) + rng.normal(size=2) @ rng.normal(size=(2, 8))
    shortcut = fit_n_njtc(moments_of(x, y), 6, fitted_at=1)
    np.testing.assert_allclose(shortcut.apply(x), y, atol=JUMP_FP32_RELATIVE * np.abs(y).max())


def test_large_means_keep_fp32_close_to_float64(rng, moments_of):
    x = rng.normal(size=(400, 16)) + 100 * rng.normal(size=16)
    y = x @ rng.normal(size=(16, 16)) + rng.normal(size=(400, 16))
    shortcut = fit_n_njtc(moments_of(x, y), 5, fitted_at=1)
    rows = x.astype(np.float32)
    expected = in_float64(shortcut, rows.astype(np.float64))
    difference = np.abs(shortcut.apply(rows) - expected).max()
    assert difference <= JUMP_FP32_RELATIVE * np.abs(expected).max()


def test_fit_is_deterministic(paired_rows, moments_of):
    x, y = paired_rows(100, 8)
    a, b = (fit_n_njtc(moments_of(x, y), 3, fitted_at=2) for _ in range(2))
    for name in ("scale", "shift", "down", "up"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_levels_are_numbered_by_blocks_run_and_read_one_at_a_time(paired_rows, moments_of):
    alive = 0

    def levels():
        nonlocal alive
        for _ in range(3):
            alive += 1
            yield moments_of(*paired_rows(40, 5))

    shortcuts = fit_levels(levels(), 2)
    assert [s.fitted_at for s in shortcuts] == [1, 2, 3]
    assert {s.kind for s in shortcuts} == {"n-njtc"}
    assert alive == 3


@pytest.mark.parametrize("rank", [-1, 0, 9])
def test_rank_outside_the_hidden_size_is_refused(moments_of, paired_rows, rank):
    with pytest.raises(UsageError, match=rf"Rank {rank} is outside 1\.\.8"):
        fit_n_njtc(moments_of(*paired_rows(50, 8)), rank, fitted_at=1)


def test_too_few_rows_are_refused_with_the_number_needed(moments_of, paired_rows):
    assert rows_needed(8) == 16
    with pytest.raises(CalibrationError, match="15 tokens to fit on, fewer than the 16"):
        fit_n_njtc(moments_of(*paired_rows(15, 8)), 2, fitted_at=1)
    fit_n_njtc(moments_of(*paired_rows(16, 8)), 2, fitted_at=1)


def test_inputs_that_are_all_alike_are_refused(rng, moments_of):
    moments = moments_of(np.full((40, 4), 0.1), rng.normal(size=(40, 4)))
    with pytest.raises(CalibrationError, match="after block 7 are the same"):
        fit_n_njtc(moments, 2, fitted_at=7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused(paired_rows, bad, which):
    rows = paired_rows(40, 4)
    rows[which][3, 2] = bad
    moments = Moments(4)
    moments.update(*rows)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        fit_n_njtc(moments, 2, fitted_at=1)
