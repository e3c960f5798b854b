"""Agreement that a few tokens decide is agreement over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.shortcuts.gates import _Agreement


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_agreement_is_that_of_all_logits(rng, noise, biased):
    norm = FinalNorm("rms", np.ones(12, np.float32), None, 1e-6)
    weight = rng.normal(size=(300, 12)).astype(np.float32)
    bias = rng.normal(size=300).astype(np.float32) if biased else None
    head = LanguageHead(norm, weight, bias, softcap=30.0 if biased else None)
    final = rng.normal(size=(200, 12)).astype(np.float32)
    guess = (final + noise * rng.normal(size=final.shape)).astype(np.float32)
    chosen, others = (head.logits(each.astype(np.float64)) for each in (final, guess))
    expected = chosen.argmax(axis=1) == others.argmax(axis=1)
    np.testing.assert_array_equal(_Agreement(head, final).of(guess), expected)
