"""What of the TensorRT backend can be shown without a GPU: its graphs, plans and sources."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from chain import build_chain
from tiny_models import VARIANTS, make_checkpoint
from tolerances import BLOCK_FP32_RELATIVE

from ojfa_export.backends.cuda.sources import SOURCES, definitions, source_directory
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.backends.tensorrt.graphs import parts, transposed
from ojfa_export.backends.tensorrt.plan import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    GraphPlan,
    check_built_for,
    profile_for,
    read_plan,
)
from ojfa_export.errors import BackendError, BundleError
from ojfa_export.graphs.weights import references
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import Config

HERE = {"tensorrt": "8.6.0", "gpu": "NVIDIA H200", "compute capability": "9.0", "driver": "x"}


@pytest.fixture(scope="module", params=["qwen3", "llama-attention-bias", "gpt2", "stablelm"])
def chain(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return build_chain(make_checkpoint(request.param, directory / "c", seed=5), directory)


def weights_of(chain, name):
    """A portable graph's references, and their values as they lie in device memory."""
    refs = references(onnx.load(chain.graphs / f"{name}.onnx", load_external_data=False))
    values = {}
    for key, ref in refs.items():
        stored = np.memmap(chain.graphs / ref.location, np.float32, "r", ref.offset, ref.dims)
        values[key] = np.ascontiguousarray(stored.T) if transposed(key) else np.array(stored)
    return refs, values


def run(model, **feeds):
    session = open_session(model.SerializeToString(), "part", Path())
    wanted = {each.name for each in session.get_inputs()}
    return session.run(None, {key: feeds[key] for key in wanted})[0]


def norm64(spec, x, weights, name):
    x = x.astype(np.float64)
    if spec.norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + spec.norm_epsilon)
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)


def linear64(x, weights, name):
    return x @ weights[f"{name}.weight"].T.astype(np.float64) + weights.get(f"{name}.bias", 0)


def assert_near(actual, expected):
    tolerance = BLOCK_FP32_RELATIVE * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def test_the_two_parts_of_a_block_against_float64(chain, rng):
    """Five tokens, whatever sequences they belong to."""
    spec = chain.spec
    refs, weights = weights_of(chain, "block_01")
    models = parts("block_01", spec, refs, "fp32")
    hidden = rng.normal(size=(5, spec.hidden_size)).astype(np.float32)
    mixed = rng.normal(size=(5, spec.heads * spec.head_dim)).astype(np.float32)
    qkv = linear64(norm64(spec, hidden, weights, "attention.norm"), weights, "attention.qkv")
    assert_near(run(models["block.qkv"], hidden=hidden, **weights), qkv)
    attended = hidden + linear64(mixed.astype(np.float64), weights, "attention.out")
    up = linear64(norm64(spec, attended, weights, "mlp.norm"), weights, "mlp.up")
    if spec.gated:
        gate, up = np.split(up, 2, axis=-1)
        inner = gate / (1 + np.exp(-gate)) * up
    else:
        cubic = up + 0.044715 * up**3
        inner = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * cubic))
    expected = attended + linear64(inner, weights, "mlp.down")
    assert_near(run(models["block.mlp"], hidden=hidden, mixed=mixed, **weights), expected)


def test_equal_blocks_are_equal_graphs(chain):
    """So that one engine serves all of them."""
    spec = chain.spec
    first, last = (
        parts(name, spec, weights_of(chain, name)[0], "fp32")
        for name in ("block_00", f"block_{spec.blocks - 1:02d}")
    )
    for name, model in first.items():
        assert model.SerializeToString() == last[name].SerializeToString()


@pytest.mark.parametrize("final", [True, False])
def test_heads(chain, rng, final):
    name = "final_head" if final else "exit_head"
    refs, weights = weights_of(chain, name)
    model = parts(name, chain.spec, refs, "fp32")[name]
    assert not model.graph.initializer or all(
        len(each.dims) < 2 for each in model.graph.initializer
    )
    hidden = rng.normal(size=(3, chain.spec.hidden_size)).astype(np.float32)
    expected = chain.engines.logits(hidden, chain.spec.blocks if final else 1)
    assert_near(run(model, hidden=hidden, **weights), expected)


@pytest.mark.parametrize(
    ("tokens", "profile"),
    [(1, 0), (DECODE_TOKENS[-1], 0), (DECODE_TOKENS[-1] + 1, 1), (PREFILL_TOKENS[-1], 1)],
)
def test_which_profile_serves_a_step(tokens, profile):
    assert profile_for(tokens) == profile


def test_engines_of_another_gpu_are_refused_by_name():
    check_built_for({**HERE, "driver": "older"}, HERE)
    with pytest.raises(BackendError, match=r"gpu NVIDIA A10 \(here: NVIDIA H200\)") as error:
        check_built_for({**HERE, "gpu": "NVIDIA A10"}, HERE)
    assert "ojfa-export build BUNDLE --backend tensorrt" in error.value.hint
    with pytest.raises(BackendError, match=r"tensorrt 10\.3\.0 \(here: 8\.6\.0\)"):
        check_built_for({**HERE, "tensorrt": "10.3.0"}, HERE)
    with pytest.raises(BackendError, match="tensorrt unknown"):
        check_built_for({}, HERE)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("olmo2", "norms after attention and MLP alone"),
        ("gpt_neox", "attention and MLP side by side"),
    ],
)
def test_parts_without_kernels_are_refused_by_name(name, part):
    from ojfa_export.backends.tensorrt.parts import check_parts

    fields = json.loads(VARIANTS[name].build_config().to_json_string())
    spec = read_spec(Config(fields, "config.json"))[1]
    with pytest.raises(BackendError, match=f"this model has {part}") as error:
        check_parts(spec)
    assert "--backend onnxruntime" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"norms": "after"}, "norms after attention and MLP alone"),
        ({"norms": "both", "norm": "layer"}, "LayerNorms after attention and MLP"),
        ({"parallel": True}, "attention and MLP side by side"),
        ({"qk_norm": "projection"}, "norms over all heads"),
    ],
)
def test_each_part_without_kernels_is_refused(changes, part):
    from ojfa_export.backends.tensorrt.parts import check_parts

    fields = json.loads(VARIANTS["llama"].build_config().to_json_string())
    spec = read_spec(Config(fields, "config.json"))[1]
    check_parts(spec)
    with pytest.raises(BackendError, match=f"this model has {part}"):
        check_parts(spec.model_copy(update=changes))


def test_a_plan_names_files_beside_it_only(tmp_path):
    path = tmp_path / "block_00.json"
    plan = GraphPlan(
        precision="fp16",
        engines={"qkv": "block.qkv.engine"},
        kernels={},
        weights={},
        activation_bytes=0,
    )
    path.write_text(plan.model_dump_json())
    with pytest.raises(BundleError, match="which the bundle doesn't hold"):
        read_plan(path)
    (tmp_path / "block.qkv.engine").touch()
    assert read_plan(path) == plan
    path.write_text(plan.model_dump_json().replace("block.qkv", "../elsewhere/block.qkv"))
    with pytest.raises(BundleError, match="names a file elsewhere"):
        read_plan(path)
    for damaged in ("", "{", '{"precision": "fp8"}', "[]"):
        path.write_text(damaged)
        with pytest.raises(BundleError, match="can't be read"):
            read_plan(path)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_compile(chain, tmp_path):
    """For another chip and precision with each model: a compilation takes seconds."""
    architecture, precision = {
        "qwen3": ("sm_90", "fp16"),
        "llama-attention-bias": ("sm_80", "fp32"),
        "gpt2": ("sm_89", "fp16"),
        "stablelm": ("sm_90", "bf16"),
    }[chain.graphs.parent.name[:-1]]
    macros = [f"-D{name}={value}" for name, value in definitions(chain.spec, precision).items()]
    for source in SOURCES:
        command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", *macros]
        command += ["-o", str(tmp_path / "out.cubin"), str(source_directory() / source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr
