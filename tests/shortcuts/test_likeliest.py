"""Likeliest tokens without logits: the very ones of NumPy's argmax where arithmetic is exact."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import FOLD_FP32_RELATIVE

from ojfa_export.graphs.fold import FoldedHead, fold
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.models.likeliest import ROWS, TOKENS, Likeliest
from ojfa_export.shortcuts.narrow_tokens import CELL, WIDEST, NarrowTokens, _Cells


def small_integers(rng, shape, most=5):
    """fp32 numbers whose products and sums are exact, and full of ties."""
    return rng.integers(-most, most + 1, shape).astype(np.float32)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 7), (ROWS + 5, 2 * TOKENS + 3)])
def test_the_lowest_of_the_largest_logits(rng, rows, vocabulary, biased):
    x, weight = small_integers(rng, (rows, 3)), small_integers(rng, (vocabulary, 3))
    bias = small_integers(rng, vocabulary) if biased else None
    found = Likeliest(rows)
    middle = vocabulary // 2
    found.see(x, weight[:middle], None if bias is None else bias[:middle])
    found.see(x, weight[middle:], None if bias is None else bias[middle:], middle)
    logits = x @ weight.T + (0 if bias is None else bias)
    np.testing.assert_array_equal(found.tokens, logits.argmax(axis=1))


def test_a_head_and_its_softcap(rng):
    norm = FinalNorm("rms", rng.uniform(0.5, 2, 12).astype(np.float32), None, 1e-6)
    weight = rng.normal(size=(300, 12)).astype(np.float16)
    h = rng.normal(size=(50, 12)).astype(np.float32)
    for head in (
        LanguageHead(norm, weight, None),
        LanguageHead(norm, weight, rng.normal(size=300), softcap=30.0),
    ):
        chosen, logits = head.likeliest(h), head.logits(h.astype(np.float64))
        behind = logits.max(axis=1) - logits[np.arange(50), chosen]
        assert behind.max() <= FOLD_FP32_RELATIVE * np.abs(logits).max()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("vocabulary", [1, CELL, CELL + 1, 1111])
@pytest.mark.parametrize("width", [1, 2, 5, WIDEST + 1])
def test_no_token_is_lost_to_the_cells(rng, width, vocabulary, biased):
    weight = small_integers(rng, (vocabulary, width))
    head = FoldedHead(
        project=np.eye(width, dtype=np.float32),
        bias=np.zeros(width, np.float32),
        # Larger than any mean square, and a power of four: z is divided by 2^20 and stays exact.
        eps=2.0**40,
        weight=weight,
        logit_bias=small_integers(rng, vocabulary) * np.float32(2**-20) if biased else None,
    )
    h = small_integers(rng, (200, width))
    expected = head.logits(h.astype(np.float32)).argmax(axis=1)
    np.testing.assert_array_equal(NarrowTokens(head)(h), expected)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_folded_jump_and_what_its_cells_rule_out(rng, random_shortcut, kind):
    hidden, vocabulary = 24, 4000
    bias = rng.normal(size=hidden).astype(np.float32) if kind == "layer" else None
    norm = FinalNorm(kind, rng.uniform(0.5, 2, hidden).astype(np.float32), bias, 1e-5)
    weight = rng.normal(size=(vocabulary, hidden)).astype(np.float32)
    head = fold(random_shortcut(hidden, 3), norm, weight, None)
    h = (5 * rng.normal(size=hidden) + rng.normal(size=(300, hidden))).astype(np.float32)
    chosen, logits = NarrowTokens(head)(h), head.logits(h).astype(np.float64)
    behind = logits.max(axis=1) - logits[np.arange(300), chosen]
    assert behind.max() <= FOLD_FP32_RELATIVE * np.abs(logits).max()
    candidates = _Cells(head.weight, head.logit_bias).candidates(head.narrowed(h))
    assert len(candidates) < vocabulary / 2, "a search that rules out nothing saves nothing"


def test_rows_of_no_numbers_and_no_rows(rng, random_shortcut):
    norm = FinalNorm("rms", np.ones(8, np.float32), None, 1e-5)
    head = fold(random_shortcut(8, 2), norm, rng.normal(size=(100, 8)), None)
    tokens = NarrowTokens(head)(np.full((2, 8), np.nan, np.float32))
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert NarrowTokens(head)(np.empty((0, 8), np.float32)).shape == (0,)
