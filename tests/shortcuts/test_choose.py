from __future__ import annotations

import numpy as np
import pytest

from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.shortcuts.choose import TransferMatrix, choose, transfer_matrix
from ojfa_export.shortcuts.fit import fit_levels
from ojfa_export.shortcuts.metrics import FullModelReference, evaluate


def matrix_of(precision, surprisal=None):
    p = np.asarray(precision, float)
    s = np.zeros_like(p) if surprisal is None else np.asarray(surprisal, float)
    return TransferMatrix(p, p, p, s)


def test_every_cell_is_the_jump_of_its_row_at_the_exit_of_its_column(
    rng, paired_rows, moments_of, tmp_path
):
    hidden, final = zip(*(paired_rows(80, 8) for _ in range(3)), strict=True)
    norm = FinalNorm("layer", np.ones(8, np.float32), rng.normal(size=8).astype(np.float32), 1e-5)
    weight, bias = rng.normal(size=(40, 8)), rng.normal(size=40)
    head = LanguageHead(norm, weight, bias)
    reference = FullModelReference(final[0], head, tmp_path)
    jumps = fit_levels(map(moments_of, hidden, final), 2)
    calls = []
    matrix = transfer_matrix(
        jumps,
        hidden,
        norm,
        weight,
        bias,
        reference,
        lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i, 9) for i in range(1, 10)]
    for fitted_at in (1, 2, 3):
        for used_at in (1, 2, 3):
            jump = jumps[fitted_at - 1]
            # Unfolded, in fp32: a token whose top two logits tie to 1e-6 is not to be expected.
            expected = evaluate(
                lambda h, jump=jump: head.likeliest(jump.apply(h)), hidden[used_at - 1], reference
            )
            measured = matrix.quality(fitted_at=fitted_at, used_at=used_at)
            assert measured.model_dump() == pytest.approx(expected.model_dump(), abs=1e-9)


def test_levels_without_a_shortcut_are_refused(random_shortcut, rng, tmp_path):
    norm = FinalNorm("rms", np.ones(8, np.float32), None, 1e-5)
    weight, hidden = rng.normal(size=(9, 8)), rng.normal(size=(4, 8))
    reference = FullModelReference(hidden, LanguageHead(norm, weight, None), tmp_path)
    with pytest.raises(ValueError, match="1 shortcuts, but hidden states of 2 levels"):
        transfer_matrix([random_shortcut(8, 2)], [hidden] * 2, norm, weight, None, reference)


def test_best_mean_precision_over_all_exits_wins():
    choice = choose(matrix_of([[0.9, 0.1, 0.1], [0.4, 0.5, 0.6], [0.0, 0.0, 0.8]]))
    assert choice.fitted_at == 2
    for number in ("block 2", "50.0%", "all 3 exits", "26.7%", "73.3%", "23.3 percentage points"):
        assert number in choice.reason, choice.reason


def test_ties_go_to_lower_surprisal_then_to_the_lower_level():
    same = [[0.5, 0.5]] * 2
    assert choose(matrix_of(same, [[3, 3], [2, 2]])).fitted_at == 2
    assert choose(matrix_of(same, [[2, 2], [2, 2]])).fitted_at == 1


def test_model_of_two_blocks_has_one_level():
    choice = choose(matrix_of([[0.25]], [[1.5]]))
    assert choice.fitted_at == 1
    assert "25.0%" in choice.reason
    assert "arbitrary" not in choice.reason
