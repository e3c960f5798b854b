"""The norms of queries and keys against float64, run on the CPU thread by thread (cuda_on_cpu)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from kernels_on_cpu import CpuKernels
from tiny_models import VARIANTS

from ojfa_export.backends.cuda.sources import definitions
from ojfa_export.backends.tensorrt.qk_norm import norm_queries_and_keys
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import Config

ROUNDING = 2e-6  # relative: a few dozen roundings of fp32


# Heads that fill a thread block's warps in part, and features that fill a warp's lanes in part.
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 20), (9, 3, 128)])
def test_norms_of_each_head(rng, tmp_path, heads, kv_heads, head_dim):
    fields = json.loads(VARIANTS["qwen3"].build_config().to_json_string())
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rotary_dim": head_dim}
    spec = read_spec(Config(fields, "config.json"))[1].model_copy(update=sizes)
    sources = ("qk_norm.cu",)
    kernels = CpuKernels("qk_norm.cpp", sources, definitions(spec, "fp16"), tmp_path)
    given = (10 * rng.standard_normal((3, heads + 2 * kv_heads, head_dim))).astype(np.float32)
    given[1, 0] = 0  # a head without anything is nothing afterwards
    weights = [rng.standard_normal(head_dim).astype(np.float32) for _ in range(2)]
    qkv = given.copy()
    addresses = (each.ctypes.data for each in (qkv, *weights))
    norm_queries_and_keys(kernels, spec, len(qkv), *addresses)
    exact = given.astype(np.float64)
    scale = np.sqrt((exact**2).mean(axis=-1, keepdims=True) + spec.norm_epsilon)
    exact = exact / scale
    expected = np.concatenate(
        [
            exact[:, :heads] * weights[0],
            exact[:, heads : heads + kv_heads] * weights[1],
            given[:, heads + kv_heads :],
        ],
        axis=1,
    )
    np.testing.assert_allclose(qkv, expected, rtol=ROUNDING, atol=1e-7)
    np.testing.assert_array_equal(qkv[:, heads + kv_heads :], given[:, heads + kv_heads :])
