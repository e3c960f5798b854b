"""Zero points with a fraction: what digits stand for, and weights that lie on such a grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_checkpoints import make_q4_1, q4_1
from tolerances import Q4_1_BLOCKS, Q4_1_STEPS

from ojfa_export.backends.onnxruntime.quantise import quantise as to_the_nearest
from ojfa_export.bundle.weight_format import GROUP_SIZES, PACKED, WeightFormat, dequantise, pack
from ojfa_export.compiler.fitted_weights import WeightFitter
from ojfa_export.graphs import gptq
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.input_factor import InputFactor
from ojfa_export.graphs.quantised import Quantiser
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.verify.exact import HIDDEN, ExactModel


def form_of(group_size: int) -> WeightFormat:
    return WeightFormat(storage="int4", group_size=group_size, zero_points=True, offsets=True)


@settings(max_examples=60, deadline=None)
@given(
    group_size=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    largest=st.sampled_from([0.0, 1e-30, 1e-3, 1e4]),
)
def test_stored_offsets_are_added_to_their_groups(group_size, groups, seed, largest):
    rng, form, outputs = np.random.default_rng(seed), form_of(group_size), 3
    inputs = groups * group_size
    numbers = rng.integers(16, size=(outputs, inputs)).astype(np.uint8)
    points = rng.integers(16, size=(outputs, groups)).astype(np.uint8)
    scales = rng.uniform(0.1, 1, size=(outputs, groups)).astype(np.float32)
    offsets = (largest * rng.uniform(-1, 1, size=(outputs, groups))).astype(np.float32)
    matrix = pack(numbers, scales, points, form, offsets=offsets)
    stored = matrix.packed.shape, matrix.scales.shape
    assert stored == tuple(form.shapes(inputs, outputs)[end] for end in (PACKED, ".scales"))
    assert form.inputs_of(matrix.scales.shape[1]) == inputs
    whole = (numbers.reshape(outputs, groups, -1).astype(float) - points[:, :, None]) * scales[
        :, :, None
    ]
    found = dequantise(matrix, form, np.float64).reshape(outputs, groups, -1) - whole
    # 8 bits of an output's largest offset, and float64's rounding of the weights.
    unit = np.abs(offsets).max(axis=1)[:, None, None] / 119
    assert (np.abs(found - offsets[:, :, None]) <= 0.501 * unit + 1e-14).all()


@pytest.mark.parametrize("is_fitted", [False, True])
def test_numbers_of_q4_1_are_found_again(rng, is_fitted):
    form, features = form_of(32), 160
    columns = q4_1(rng.standard_normal((50, features)), 32).T
    if is_fitted:
        x = rng.standard_normal((300, 20)) @ rng.standard_normal((20, features))
        made = gptq.quantise(columns, form, InputFactor.of(x))
    else:
        made = to_the_nearest(np.ascontiguousarray(columns), form)
    steps = np.repeat(made.scales[:, : features // 32], 32, axis=1)
    assert (np.abs(dequantise(made, form) - columns.T) <= Q4_1_STEPS * steps).all()


@pytest.mark.parametrize("is_fitted", [False, True])
def test_a_model_of_q4_1_is_nearly_what_it_was(is_fitted, rng, tmp_path):
    """In float64, against itself in fp32 weights."""
    form = form_of(32)
    checkpoint, hidden = Checkpoint(make_q4_1(tmp_path / "checkpoint", 32, seed=3)), []
    rotary = checkpoint.family.rotary(checkpoint.config).tables(64)
    token_ids = rng.integers(checkpoint.spec.vocab_size, size=(6, 40)).astype(np.int32)
    for name, quantiser in (("wide", None), ("fractional", Quantiser(form, to_the_nearest))):
        folder = tmp_path / name
        folder.mkdir()
        exporter = Exporter(checkpoint, folder, "fp32", 64, quantiser)
        exact = ExactModel(checkpoint.spec, folder, rotary)
        if is_fitted and quantiser is not None:
            exporter.fitter = WeightFitter(exact, token_ids, quantiser)
        exporter.embed()
        hidden.append(exact.embed(token_ids))
        for index in range(checkpoint.spec.blocks):
            exporter.block(index)
            hidden[-1] = exact.block(index, hidden[-1])[HIDDEN]
    wide, fractional = hidden
    assert np.linalg.norm(fractional - wide) <= Q4_1_BLOCKS * np.linalg.norm(wide)
