from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tolerances import FIT_LOSS_RELATIVE, JUMP_FP32_RELATIVE

from ojfa_export.shortcuts.descent import descend_n_njtc
from ojfa_export.shortcuts.fit import fit_n_njtc, training_loss
from ojfa_export.shortcuts.kinds import Identity, Linear, PerExit, fit_jtc, fit_njtc
from ojfa_export.shortcuts.similarity import cosine_similarity, most_similar_level


def loss_on_rows(prediction: np.ndarray, y: np.ndarray) -> float:
    return float(((prediction - y) ** 2).sum(axis=1).mean())


def test_jtc_is_least_squares_without_a_bias(paired_rows, moments_of):
    x, y = paired_rows(300, 9)
    expected = np.linalg.lstsq(x, y)[0]
    matrix = fit_jtc(moments_of(x, y)).matrix
    np.testing.assert_allclose(matrix, expected, atol=JUMP_FP32_RELATIVE * np.abs(expected).max())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_njtc_is_as_good_as_alternating_least_squares(paired_rows, moments_of, rng, rank):
    x, y = paired_rows(300, 9)
    narrow = fit_njtc(moments_of(x, y), rank)
    assert narrow.parameters == 2 * 9 * rank
    down = rng.normal(size=(9, rank))
    for _ in range(2000):
        up = np.linalg.lstsq(x @ down, y)[0]
        down = np.linalg.lstsq(x, y @ np.linalg.pinv(up))[0]
    other = loss_on_rows(x @ down @ np.linalg.lstsq(x @ down, y)[0], y)
    loss = loss_on_rows(narrow.apply(x), y)
    assert loss <= other * (1 + FIT_LOSS_RELATIVE)
    assert loss >= other * (1 - 1e-3)


def test_njtc_of_inputs_without_variance_is_finite(moments_of, rng):
    x = np.zeros((50, 6))
    x[:, 0] = rng.normal(size=50)
    narrow = fit_njtc(moments_of(x, rng.normal(size=(50, 6))), 4)
    assert np.isfinite(narrow.apply(x)).all()


def test_a_map_for_every_exit(rng):
    maps = [Linear(rng.normal(size=(5, 5)).astype(np.float32)) for _ in range(3)]
    every = PerExit(maps)
    h = rng.normal(size=(4, 5))
    assert every.parameters == 75
    for blocks_run in (1, 2, 3):
        np.testing.assert_array_equal(every.apply(h, blocks_run), maps[blocks_run - 1].apply(h))
    for blocks_run in (None, 0, 4):
        with pytest.raises(ValueError, match="no map for exit"):
            every.apply(h, blocks_run)
    assert Identity().apply(h, 1) is h


def test_cosines_are_those_of_the_products(random_shortcut):
    jumps = [random_shortcut(7, rank) for rank in (2, 3, 5, 7)]
    flat = np.array([(each.down.astype(float) @ each.up).ravel() for each in jumps])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    expected = flat @ flat.T
    np.testing.assert_allclose(cosine_similarity(jumps), expected, atol=1e-12)
    assert most_similar_level(jumps) == expected.mean(axis=1).argmax() + 1


def test_the_level_that_others_resemble_is_chosen(random_shortcut, rng):
    first, last = rng.normal(size=(2, 20, 20))
    up = np.eye(20, dtype=np.float32)
    jumps = [
        replace(random_shortcut(20, 20), down=matrix.astype(np.float32), up=up)
        for matrix in (first, first + last, last)
    ]
    assert most_similar_level(jumps) == 2


def test_descent_comes_near_the_closed_form_and_not_below(paired_rows, moments_of):
    x, y = paired_rows(1024, 6)
    moments = moments_of(x, y)
    best = training_loss(moments, fit_n_njtc(moments, 3, fitted_at=1))
    trained = descend_n_njtc(x, y, 3, fitted_at=1, epochs=150, learning_rate=0.03)
    descended = training_loss(moments, trained)
    variance = float(y.var(axis=0).sum())
    assert best <= descended * (1 + FIT_LOSS_RELATIVE)
    assert descended < best + 0.1 * (variance - best)
