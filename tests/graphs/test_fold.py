from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from tolerances import FOLD_FLOAT64_RELATIVE, FOLD_FP32_RELATIVE

import ojfa_export.models.head
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.graphs.fold import fold
from ojfa_export.models.head import FinalNorm, LanguageHead

VOCABULARY = 37


@pytest.fixture
def norm(rng):
    def make(kind, hidden, bias=False):
        offset = rng.normal(size=hidden).astype(np.float32) if bias else None
        return FinalNorm(kind, rng.uniform(0.5, 2, hidden).astype(np.float32), offset, 1e-5)

    return make


def unfolded(shortcut, norm, weight, bias, h):
    """Norm and head on the whole jump, with torch's norms, in float64."""

    def double(array):
        return None if array is None else torch.from_numpy(np.asarray(array, np.float64))

    y = (double(h) * double(shortcut.scale) + double(shortcut.shift)) @ double(shortcut.down)
    y = y @ double(shortcut.up)
    hidden = (y.shape[-1],)
    if norm.kind == "layer":
        y = torch.layer_norm(y, hidden, double(norm.weight), double(norm.bias), norm.eps)
    else:
        y = torch.rms_norm(y, hidden, double(norm.weight), norm.eps)
        y = y if norm.bias is None else y + double(norm.bias)
    logits = y @ double(weight).T
    return (logits if bias is None else logits + double(bias)).numpy()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("norm_bias", "head_bias"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_folded_head_is_the_unfolded_one(
    rng, norm, random_shortcut, kind, norm_bias, head_bias, rank
):
    shortcut, final = random_shortcut(24, rank), norm(kind, 24, norm_bias)
    weight = rng.normal(size=(VOCABULARY, 24)).astype(np.float32)
    bias = rng.normal(size=VOCABULARY).astype(np.float32) if head_bias else None
    h = rng.normal(size=(20, 24)) * np.logspace(-3, 3, 20)[:, None]  # eps matters in the small ones
    expected = unfolded(shortcut, final, weight, bias, h)

    exact = fold(shortcut, final, weight, bias, dtype=np.float64)
    assert exact.project.shape == (24, rank)
    assert exact.weight.shape == (VOCABULARY, rank)
    difference = np.abs(exact.logits(h) - expected).max()
    assert difference <= FOLD_FLOAT64_RELATIVE * np.abs(expected).max()

    single = fold(shortcut, final, weight, bias)
    assert {a.dtype for a in (single.project, single.bias, single.weight)} == {np.dtype(np.float32)}
    assert (single.logit_bias is None) == (not norm_bias and not head_bias)
    # A sum that cancels is rounded as its terms are, which the norm then enlarges.
    scaled = h * shortcut.scale + shortcut.shift
    terms = np.linalg.norm(np.abs(scaled) @ np.abs(shortcut.down), axis=1)
    kept = np.linalg.norm(scaled @ shortcut.down, axis=1) > 0.05 * terms
    difference = np.abs(single.logits(h.astype(np.float32)) - expected)[kept].max()
    assert difference <= FOLD_FP32_RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_head_on_disk_in_any_float_type_read_in_pieces(
    rng, norm, random_shortcut, tmp_path, monkeypatch, dtype
):
    monkeypatch.setattr(ojfa_export.models.head, "_BYTES_AT_ONCE", 10 * 12 * 8)  # ten rows of 37
    weight = np.memmap(tmp_path / "head", dtype, mode="w+", shape=(VOCABULARY, 12))
    weight[:] = rng.normal(size=weight.shape).astype(dtype)
    shortcut, final = random_shortcut(12, 4), norm("layer", 12, bias=True)
    h = rng.normal(size=(6, 12))
    expected = unfolded(shortcut, final, weight, None, h)
    difference = fold(shortcut, final, weight, None, dtype=np.float64).logits(h) - expected
    assert np.abs(difference).max() <= FOLD_FLOAT64_RELATIVE * np.abs(expected).max()


def test_folding_leaves_its_inputs_alone(rng, norm, random_shortcut):
    shortcut, final = random_shortcut(8, 3), norm("layer", 8, bias=True)
    weight, bias = rng.normal(size=(9, 8)), rng.normal(size=9)
    before = bias.copy(), shortcut.up.copy()
    fold(shortcut, final, weight, bias, dtype=np.float64)
    np.testing.assert_array_equal(bias, before[0])
    np.testing.assert_array_equal(shortcut.up, before[1])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_language_head_is_torchs_norm_and_linear(rng, norm, kind, dtype, monkeypatch):
    monkeypatch.setattr(ojfa_export.models.head, "_BYTES_AT_ONCE", 16 * 16 * 4)
    final = norm(kind, 16, bias=kind == "layer")
    weight, bias = rng.normal(size=(VOCABULARY, 16)), rng.normal(size=VOCABULARY)
    h = rng.normal(size=(5, 16)) + 3
    identity = identity_jump(16)
    logits = LanguageHead(final, weight, bias).logits(h.astype(dtype))
    assert logits.dtype == dtype
    tolerance = FOLD_FP32_RELATIVE if dtype == np.float32 else FOLD_FLOAT64_RELATIVE
    expected = unfolded(identity, final, weight, bias, h)
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


def identity_jump(hidden):
    one, eye = np.ones(hidden, np.float32), np.eye(hidden, dtype=np.float32)
    return Shortcut(one, 0 * one, eye, eye, "n-njtc", 1)


def test_residual_shortcut_is_refused(rng, norm, random_shortcut):
    shortcut = replace(random_shortcut(8, 3), residual=True)
    with pytest.raises(ValueError, match="residual"):
        fold(shortcut, norm("rms", 8), rng.normal(size=(9, 8)), None)


def test_head_of_another_hidden_size_is_refused(rng, norm, random_shortcut):
    with pytest.raises(ValueError, match="do not fit hidden size 8"):
        fold(random_shortcut(8, 3), norm("rms", 8), rng.normal(size=(9, 7)), None)
