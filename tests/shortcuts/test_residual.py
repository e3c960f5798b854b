from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tolerances import FIT_LOSS_RELATIVE, LOGITS_FP32

from ojfa_export.bundle.shortcut_file import load, save
from ojfa_export.errors import CalibrationError
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.shortcuts.distil import _Student, distil, split_rows
from ojfa_export.shortcuts.residual import fit_residual

BLOCKS, HIDDEN, ROWS = 5, 10, 640


@pytest.fixture
def planted(rng):
    """Hidden states at depths 1..L that a residual jump of rank 2 explains exactly."""
    gates = np.array([2.0, 1.5, 1.0, 0.5])
    levels = [rng.normal(size=(ROWS, HIDDEN)) * rng.uniform(0.5, 2) for _ in gates]
    left, right = rng.normal(size=(HIDDEN, 2)), rng.normal(size=(2, HIDDEN))
    last = rng.normal(size=(ROWS, HIDDEN))
    # Solves y = h + g ((h + t) A) for h, so that all levels lead to the same y.
    jump, offset = 0.1 * left @ right, 0.1 * rng.normal(size=2) @ right
    levels = [(last - g * offset) @ np.linalg.inv(np.eye(HIDDEN) + g * jump) for g in gates]
    return [None, *levels, last]


@pytest.fixture
def mixed(rng):
    """Hidden states that come nearer to the last from level to level, and partly on a line."""
    last = 2 * rng.normal(size=(ROWS, HIDDEN)) + rng.normal(size=HIDDEN)
    mixing = rng.normal(size=(HIDDEN, HIDDEN)) / 3
    return [
        None,
        *(
            last + (1 - depth / BLOCKS) * (last @ mixing + rng.normal(size=last.shape))
            for depth in range(1, BLOCKS)
        ),
        last,
    ]


def head_of(rng, kind: str) -> LanguageHead:
    bias = rng.normal(size=HIDDEN).astype(np.float32) if kind == "layer" else None
    norm = FinalNorm(kind, rng.uniform(0.5, 2, HIDDEN).astype(np.float32), bias, 1e-5)
    return LanguageHead(norm, rng.normal(size=(23, HIDDEN)).astype(np.float32), None)


def squared_error(shortcut, levels) -> float:
    errors = [shortcut.apply(h, k) - levels[-1] for k, h in enumerate(levels[1:-1], start=1)]
    return float(np.mean(np.square(errors)))


def test_finds_a_planted_jump(planted):
    shortcut = fit_residual(planted.__getitem__, BLOCKS, np.arange(ROWS), 2)
    identity = replace(shortcut, gates=np.zeros(BLOCKS - 1, np.float32))
    assert squared_error(shortcut, planted) < 1e-6 * squared_error(identity, planted)


def test_one_exit_at_full_rank_is_least_squares(mixed):
    h, y = mixed[1], mixed[-1]
    levels = [None, h, y]
    shortcut = fit_residual(levels.__getitem__, 2, np.arange(ROWS), HIDDEN)
    inputs = np.column_stack([h, np.ones(ROWS)])
    expected = np.mean((h + inputs @ np.linalg.lstsq(inputs, y - h)[0] - y) ** 2)
    assert squared_error(shortcut, levels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_gates_are_the_best_for_the_map(mixed, rng, rank):
    shortcut = fit_residual(mixed.__getitem__, BLOCKS, np.arange(ROWS), rank)
    best = squared_error(shortcut, mixed)
    for _ in range(20):
        noise = rng.normal(size=BLOCKS - 1) * 10 ** rng.uniform(-3, 0)
        other = replace(shortcut, gates=(shortcut.gates + noise).astype(np.float32))
        assert best <= squared_error(other, mixed) * (1 + FIT_LOSS_RELATIVE)


def test_hidden_states_that_are_all_alike_are_refused():
    with pytest.raises(CalibrationError, match="the same for all"):
        fit_residual(lambda _: np.ones((20, 4)), 3, np.arange(20), 2)


@pytest.mark.parametrize(("kind", "softcap"), [("rms", None), ("layer", None), ("rms", 2.0)])
def test_divergence_is_that_of_the_definition(mixed, rng, kind, softcap):
    head = replace(head_of(rng, kind), softcap=softcap)
    shortcut = fit_residual(mixed.__getitem__, BLOCKS, np.arange(ROWS), 3)
    tokens = np.arange(0, ROWS, 7)

    def log_probabilities(y):
        logits = head.logits(y)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    full = log_probabilities(mixed[-1][tokens])
    for exit in range(1, BLOCKS):
        own = log_probabilities(shortcut.apply(mixed[exit][tokens], exit))
        expected = (np.exp(full) * (full - own)).sum(axis=1)
        student = _Student(shortcut, head)
        full = student.full(mixed.__getitem__, tokens)
        found = student.divergence(mixed.__getitem__, tokens, [exit], full)
        np.testing.assert_allclose(found.detach().numpy()[0], expected, atol=LOGITS_FP32)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_distillation_lowers_the_divergence(mixed, rng, kind):
    head = head_of(rng, kind)
    begin = fit_residual(mixed.__getitem__, BLOCKS, np.arange(ROWS), 2)
    result = distil(begin, mixed.__getitem__, ROWS, head, steps=60)
    assert result.loss_after < result.loss_before
    _, validation = split_rows(ROWS)
    before, after = (
        _Student(each, head).loss(mixed.__getitem__, validation)
        for each in (begin, result.shortcut)
    )
    assert before == pytest.approx(result.loss_before, rel=1e-5)
    assert result.shortcut.gates[list(np.array(result.closed, int) - 1)].any() == False  # noqa: E712
    if not result.closed:
        assert after == pytest.approx(result.loss_after, rel=1e-5)
    again = distil(begin, mixed.__getitem__, ROWS, head, steps=60)
    np.testing.assert_array_equal(again.shortcut.up, result.shortcut.up)


def test_gates_close_where_the_identity_is_right(mixed, rng):
    levels = [*mixed]
    levels[-2] = mixed[-1]  # the last exit's hidden states are the last block's already
    begin = fit_residual(levels.__getitem__, BLOCKS, np.arange(ROWS), 2)
    begin = replace(begin, gates=np.ones_like(begin.gates))
    result = distil(begin, levels.__getitem__, ROWS, head_of(rng, "rms"), steps=30)
    assert BLOCKS - 1 in result.closed
    assert result.shortcut.gates[-1] == 0


def test_no_row_is_for_both():
    for count in (8, 100, 5000):
        training, validation = split_rows(count)
        assert sorted([*training, *validation]) == list(range(count))
        assert len(validation) > 0


def test_gates_are_kept_in_the_file(mixed, tmp_path):
    shortcut = fit_residual(mixed.__getitem__, BLOCKS, np.arange(ROWS), 2)
    save(shortcut, tmp_path / "s", "0" * 64)
    loaded, _ = load(tmp_path / "s")
    np.testing.assert_array_equal(loaded.gates, shortcut.gates)
    h = mixed[2]
    np.testing.assert_array_equal(loaded.apply(h, 2), shortcut.apply(h, 2))
    assert loaded.parameters == 2 * HIDDEN * 2 + 2 * HIDDEN + BLOCKS - 1
    for blocks_run in (None, 0, BLOCKS):
        with pytest.raises(ValueError, match="no gate"):
            loaded.apply(h, blocks_run)


def test_gates_need_a_residual_jump(random_shortcut):
    with pytest.raises(ValueError, match="residual"):
        replace(random_shortcut(6, 2), gates=np.ones(3, np.float32))
