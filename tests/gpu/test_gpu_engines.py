"""Every engine by itself, run by Polygraphy rather than by us, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from elements import split_precision
from shortcut_kinds import split_kind
from tolerances import BLOCK_FP16_RELATIVE, BLOCK_FP32_RELATIVE

from ojfa_export.verify.exact import HIDDEN, ExactModel

pytestmark = pytest.mark.gpu
INDEX = 1
# Tokens that the first and the second profile take.
TOKENS = {0: 3, 1: 40}


@pytest.fixture(params=TOKENS, ids=["decode", "prefill"])
def profile(request):
    return request.param


@pytest.fixture
def exact(case):
    if case.precision == "bf16" or case.quantised:
        pytest.skip("there are no engines in bf16, and none of quantised weights")
    if case.spec.rotary_switch is not None:
        pytest.skip("LongRoPE: compared by verification, at its short length")
    tables = None
    if "cosines" in case.expected:
        tables = case.expected["cosines"], case.expected["sines"]
    return ExactModel(case.spec, case.graphs, tables)


def infer(case, graph, part, profile, **inputs):
    """An engine's output, its weights as the device has them."""
    loaders = pytest.importorskip("polygraphy.backend.trt")
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.tensorrt.plan import read_plan
    from ojfa_export.backends.tensorrt.weights import DTYPES

    the_device().make_current()
    plan = read_plan(case.plans[graph])
    path = case.plans[graph].parent / plan.engines[part]
    with loaders.TrtRunner(
        loaders.EngineFromBytes(path.read_bytes()), optimization_profile=profile
    ) as runner:
        feeds = {}
        for name in runner.get_input_metadata(use_numpy_dtypes=False):
            if name in inputs:
                feeds[name] = np.ascontiguousarray(inputs[name])
                continue
            weight = plan.weights[name]
            dtype = DTYPES[weight.precision]
            file = case.graphs / weight.file
            stored = np.memmap(file, dtype, "r", weight.offset, weight.shape)
            feeds[name] = np.ascontiguousarray(stored.T if weight.transposed else stored)
        [result] = runner.infer(feeds).values()
        return np.array(result)


def assert_near(case, actual, expected):
    share = BLOCK_FP16_RELATIVE if case.precision == "fp16" else BLOCK_FP32_RELATIVE
    tolerance = share * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def test_the_parts_of_a_block(case, exact, profile, rng):
    spec, tokens = case.spec, TOKENS[profile]
    hidden = rng.normal(size=(tokens, spec.hidden_size)).astype(np.float32)
    expected = {k: v[0] for k, v in exact.block(INDEX, hidden[None].astype(np.float64)).items()}
    name = f"block_{INDEX:02d}"
    qkv = infer(case, name, "qkv", profile, hidden=hidden)
    assert_near(case, qkv, expected["attention.qkv"])
    half = np.float16 if case.precision == "fp16" else np.float32
    mixed = expected["attention.mixed"].astype(half)
    out = infer(case, name, "mlp", profile, hidden=hidden, mixed=mixed)
    assert_near(case, out, expected[HIDDEN])


def test_heads(case, exact, profile, rng):
    hidden = rng.normal(size=(TOKENS[profile], case.spec.hidden_size)).astype(np.float32)
    heads = {"final_head": case.spec.blocks}
    if split_kind(split_precision(case.name)[0])[1] == "narrow":  # others are in kernels
        heads["exit_head"] = 1
    for name, blocks_run in heads.items():
        logits = infer(case, name, name, profile, hidden=hidden)
        assert_near(case, logits, exact.logits(hidden.astype(np.float64), blocks_run))


def test_layers_are_described(case, exact):
    """Norms run in fp32 whatever the precision; Polygraphy shows it."""
    pytest.importorskip("polygraphy")
    from ojfa_export.backends.tensorrt.layers import describe_layers
    from ojfa_export.backends.tensorrt.plan import read_plan

    plan = read_plan(case.plans["block_01"])
    shown = describe_layers(case.plans["block_01"].parent / plan.engines["qkv"])
    print(shown)
    assert "hidden" in shown
    assert "qkv" in shown
