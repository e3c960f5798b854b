"""Which checkpoints' int4 weights get fractional zero points."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from quantised_checkpoints import q4_1

from ojfa_export.bundle.weight_format import WeightFormat, dequantise
from ojfa_export.compiler.fractions import MATRIX, decide_fractions
from ojfa_export.graphs.ranges import nearest

FORM = WeightFormat(storage="int4", group_size=32, zero_points=True)


def fractional(columns: np.ndarray[Any, Any], **fields: int) -> bool:
    """What is decided for a model whose matrix this is."""
    family = SimpleNamespace(block=lambda *_: {MATRIX: "tensor"})
    checkpoint: Any = SimpleNamespace(
        family=family, config=None, spec=None, read=lambda _: columns.astype(np.float16)
    )
    form = FORM.model_copy(update=fields)
    decided = decide_fractions(checkpoint, form)
    assert decided in (form, form.model_copy(update={"offsets": True}))
    return decided.offsets


@pytest.mark.parametrize("inputs", [32, 192])
def test_weights_on_a_grid(rng: np.random.Generator, inputs: int) -> None:
    assert fractional(0.1 * q4_1(rng.standard_normal((300, inputs)), 32).T)


@pytest.mark.parametrize("inputs", [32, 192])
def test_weights_on_none(rng: np.random.Generator, inputs: int) -> None:
    for weights in (rng.standard_normal((inputs, 50)), rng.standard_t(4, (inputs, 50))):
        assert not fractional(weights)
    assert not fractional(np.zeros((inputs, 50)))


def test_weights_that_whole_zero_points_hold(rng: np.random.Generator) -> None:
    whole = nearest(rng.standard_normal((192, 50)).astype(np.float32), FORM)
    assert not fractional(dequantise(whole, FORM).T)


def test_groups_must_be_those_of_the_grid(rng: np.random.Generator) -> None:
    weights = q4_1(rng.standard_normal((300, 192)), 32).T
    assert fractional(weights)
    assert not fractional(weights, group_size=64)
