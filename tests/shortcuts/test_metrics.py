from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import LOG_PROBS_FP32_RELATIVE, SURPRISAL_NATS

from ojfa_export.errors import CalibrationError
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.shortcuts.metrics import FullModelReference, evaluate


@pytest.fixture
def head(rng):
    def make(vocabulary, hidden=12):
        norm = FinalNorm("rms", rng.uniform(0.5, 2, hidden).astype(np.float32), None, 1e-6)
        return LanguageHead(norm, rng.normal(size=(vocabulary, hidden)).astype(np.float16), None)

    return make


def log_probs(head, hidden):
    normed = torch.rms_norm(
        torch.from_numpy(hidden.astype(np.float64)),
        (hidden.shape[1],),
        torch.from_numpy(head.norm.weight.astype(np.float64)),
        head.norm.eps,
    )
    return torch.log_softmax(normed @ torch.from_numpy(head.weight.astype(np.float64)).T, dim=-1)


@pytest.mark.parametrize("vocabulary", [6, 300])
def test_identity_shortcut_against_torch(rng, head, tmp_path, vocabulary):
    final = rng.normal(size=(300, 12)).astype(np.float32)
    early = (final + 0.5 * rng.normal(size=final.shape)).astype(np.float16)
    model = head(vocabulary)
    reference = FullModelReference(final, model, tmp_path)
    quality = evaluate(model.likeliest, early, reference, chunk=77)

    full = log_probs(model, final)
    predicted = log_probs(model, early).argmax(dim=-1, keepdim=True)
    for k in (1, 5, 10):
        top = full.topk(min(k, vocabulary), dim=-1).indices
        expected = (top == predicted).any(dim=-1).double().mean().item()
        assert getattr(quality, f"precision_at_{k}") == pytest.approx(expected, abs=1e-12)
    surprisal = -full.gather(1, predicted).mean().item()
    assert quality.surprisal == pytest.approx(surprisal, abs=SURPRISAL_NATS)
    error = np.abs(reference.log_probs - full.numpy()).max()
    assert error <= LOG_PROBS_FP32_RELATIVE * full.abs().max().item()


def test_full_model_agrees_with_itself(rng, head, tmp_path):
    final = rng.normal(size=(40, 12)).astype(np.float32)
    model = head(50)
    reference = FullModelReference(final, model, tmp_path)
    quality = evaluate(model.likeliest, final, reference)
    assert quality.precision_at_1 == quality.precision_at_10 == 1
    assert quality.surprisal == pytest.approx(-float(reference.log_probs.max(axis=1).mean()))


def test_top_tokens_are_ordered_and_ties_go_to_the_lower_id(head, tmp_path, rng):
    model = head(40)
    model.weight[[3, 30]] = model.weight[17]  # three tokens that are always equally likely
    final = rng.normal(size=(20, 12)).astype(np.float32)
    reference = FullModelReference(final, model, tmp_path)
    for row, tokens in zip(reference.log_probs, reference.top_tokens, strict=True):
        np.testing.assert_array_equal(row[tokens], np.sort(row)[::-1][:10])
        tied = [t for t in tokens if t in (3, 17, 30)]
        assert tied == sorted(tied)


def test_large_logits_do_not_overflow(head, tmp_path, rng):
    model = head(30)
    loud = LanguageHead(model.norm, (model.weight * 100).astype(np.float32), None)
    final = rng.normal(size=(20, 12)).astype(np.float32)
    reference = FullModelReference(final, loud, tmp_path)
    assert np.isfinite(reference.log_probs).all()
    quality = evaluate(lambda h: loud.logits(h).argmin(axis=1), final, reference)
    assert quality.surprisal > 100
    assert evaluate(loud.likeliest, final, reference).surprisal >= 0


def test_logits_that_are_not_finite_are_refused(head, tmp_path):
    final = np.full((2, 12), np.nan, np.float32)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        FullModelReference(final, head(30), tmp_path)
