"""Keys and values in fp8 on a GPU: whole models against float64 that rounds them likewise."""

from __future__ import annotations

import numpy as np
import pytest

from ojfa_export import backends
from ojfa_export.backends.narrow_cache import has_fp8_cache, with_cache
from ojfa_export.bundle.names import graph_names
from ojfa_export.runtime.session import Session
from ojfa_export.verify.exact import HIDDEN, ExactModel
from ojfa_export.verify.tolerances import TOLERANCES, arithmetic_of

pytestmark = pytest.mark.gpu
# Plain and grouped heads, with norms of their own, in two precisions; windows.
CASES = ("llama-gqa-fp16", "gpt2-fp16", "qwen3-fp16", "gemma2-bf16", "phi3-sliding-window-fp16")
STEPS = 4


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_and_steps(cases, name, rng, tmp_path):
    case = cases(name)
    if case.spec.head_dim % 4:
        pytest.skip("heads that no kernel keeps in fp8")
    backend = with_cache(backends.load("tensorrt"), "fp8", case.precision)
    plans = {each: tmp_path / f"{each}.json" for each in graph_names(case.spec.blocks)}
    for each, plan in plans.items():
        backend.build_engine(case.spec, case.graphs / f"{each}.onnx", plan)
    tables = None
    if "cosines" in case.expected:
        tables = case.expected["cosines"], case.expected["sines"]
    engines = backend.open_engines(case.spec, case.graphs, plans, tables)
    assert has_fp8_cache(engines)
    length = case.expected["token_ids"].shape[1]
    tokens = rng.integers(case.spec.vocab_size, size=length).tolist()
    session = Session(case.spec, engines, 1, length)
    rows = [session.advance([tokens[:-STEPS]])]
    rows += [session.advance([[token]]) for token in tokens[-STEPS:]]
    exact = ExactModel(case.spec, case.graphs, tables, fp8_cache=True)
    hidden = exact.embed(np.array([tokens], np.int32))
    for block in range(case.spec.blocks):
        hidden = exact.block(block, hidden)[HIDDEN]
    expected = exact.logits(hidden[0, -STEPS - 1 :], case.spec.blocks)
    arithmetic = arithmetic_of(case.precision, quantised=False, fp8_cache=True)
    bound = TOLERANCES[arithmetic]["logits"].bound(np.abs(expected).max())
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=bound, rtol=0)
