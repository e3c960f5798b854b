"""Check heads of the backends for GPUs, on stand-ins: as on the CPU, whatever else is on a device.

How steps begun ahead get along with them is in `test_tensorrt_session.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from chain import Chain, build_chain
from checked_programs import check_program, checked_tokens, programs
from elements import split_precision
from hypothesis import HealthCheck, given, settings
from shortcut_kinds import split_kind
from tiny_models import make_checkpoint
from tolerances import LOGITS_FP32

from ojfa_export import backends

# A folded head and one behind a jump, in every precision; one with a bias for each token, one that
# caps logits.
CASES = [
    *("tensorrt llama-gqa", "tensorrt gpt2-fp16", "tensorrt gemma2"),
    *("tensorrt gpt2-residual", "tensorrt llama-gqa-mlp", "tensorrt llama-gqa-mlp-bf16"),
    *("onnxruntime-cuda gpt2", "onnxruntime-cuda llama-gqa-mlp"),
]
IN_FP32 = [case for case in CASES if split_precision(case)[1] == "fp32"]
Opened = tuple[Chain, Any]


@pytest.fixture(scope="module")
def opened(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """A model and its engines, built when first asked for."""
    from stand_in.onnxruntime_cuda import make_onnxruntime

    made: dict[str, Opened] = {}

    def open_case(case: str) -> Opened:
        if case not in made:
            backend, _, name = case.partition(" ")
            directory = tmp_path_factory.mktemp(case.replace(" ", "-"))
            name, precision = split_precision(name)
            variant, kind = split_kind(name)
            chain = build_chain(
                make_checkpoint(variant, directory / "checkpoint", seed=3),
                directory,
                kind=kind,
                precision=precision,
                max_length=64,
                check_tokens=checked_tokens(),
            )
            if backend == "onnxruntime-cuda":
                from ojfa_export.backends.onnxruntime_cuda import provider

                provider.ort = make_onnxruntime(driver)
            (directory / "built").mkdir()
            engines = chain.open_on(backends.load(backend), directory / "built")
            made[case] = chain, engines
        return made[case]

    return open_case


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_its_logits_are_rows_of_the_exit_head(case, kernels, opened, rng, monkeypatch):
    """Also of more rows than one answer has, and where TensorRT's engines run it."""
    chain, engines = opened(case)
    if not kernels:
        if not getattr(engines, "has_engines", False):
            pytest.skip("there are no engines")
        monkeypatch.setattr(engines, "decode_kernels", False)
        engines.unload_heads()
    hidden = rng.standard_normal((70, chain.spec.hidden_size), np.float32)
    for rows in (1, 3, 9, 70):
        for exit in range(1, chain.spec.blocks):
            whole = engines.logits(hidden[:rows], exit)
            given = engines.check_logits(hidden[:rows], exit)
            np.testing.assert_allclose(
                given, whole[:, chain.check_tokens], atol=LOGITS_FP32, rtol=0
            )
    engines.unload_heads()


@pytest.mark.parametrize("case", IN_FP32)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=programs)
def test_tokens_and_depths_are_those_of_whole_logits(case, opened, program):
    check_program(*opened(case), program)
