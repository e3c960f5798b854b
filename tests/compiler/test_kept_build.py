"""Builds of checkpoints that are quantised already: kept, verified, shown; or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attack.digests import edit_manifest, redigest
from click.testing import CliRunner
from quantised_checkpoints import (
    float8,
    float8_tensor,
    gptq_config,
    gptq_layer,
    scaled_weights,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from ojfa_export import backends
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.cli.app import app
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.errors import BackendError, BundleError, CheckpointError, UsageError
from ojfa_export.graphs.weights import references
from ojfa_export.verify.change import Change

Options = Callable[..., BuildOptions]
HEAD = "final_head/head"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint with act-order, and a plain one of the same weights beside it."""
    layer = gptq_layer(np.random.default_rng(5), 4, 32, act_order=True)
    config = gptq_config(4, 32, desc_act=True)
    return write_checkpoint("llama-gqa", tmp_path_factory.mktemp("gptq"), layer, config)


@pytest.fixture(scope="module")
def built(
    quantised: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its bundle, verified; the matrix of its exit head is whole groups, and not quantised."""
    options = BuildOptions(
        str(quantised),
        tmp_path_factory.mktemp("kept") / "out.ojfa",
        rank=32,
        shortcut="ojfa",
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=64,
    )
    result = build(options)
    form = "int4 in groups of 32 with zero points"
    assert f"\nweights: {form}, the checkpoint's own (gptq); perplexity " in result.summary()
    names = {check.name for check in result.report.checks}
    assert {"quantised block_00: steps", "logits full depth", "generate"} <= names
    assert "quantised final_head: steps" not in names
    return result.bundle


def test_the_bundle_says_it_all(built: Path) -> None:
    fields = json.loads((built / "manifest.json").read_text())
    expected = {"storage": "int4", "group_size": 32, "zero_points": True, "wide": [HEAD]}
    assert fields["weights"] == expected
    shown = " ".join(run("inspect", built).stdout.split())
    assert "int4 in groups of 32 with zero points as the checkpoint (gptq) has them: the" in shown
    assert "kept wider fp32: embeddings, heads; norms, biases and the shortcut" in shown
    assert "exit head's matrix" not in shown


def test_verify_compares_with_the_checkpoint(built: Path, quantised: Path) -> None:
    """With the plain one's weights everything but 8-bit products is the same."""
    result = run("verify", built, "--against", quantised, "--json")
    document = json.loads(result.stdout)
    assert document["passed"]
    change = Change.model_validate(document["change"])
    assert change.agreement > 0.8  # 8 bits of what products multiply
    steps = [each for each in document["checks"] if each["name"] == "quantised block_00: steps"]
    assert [each["max_abs_diff"] for each in steps] == [0]
    assert run("verify", built, "--against", quantised.parent / "plain").exit_code == 1


def test_another_number_is_seen(built: Path, quantised: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy.ojfa"))
    graph = onnx.load(copy / "graphs" / "block_02.onnx", load_external_data=False)
    ref = references(graph)["mlp.down.weight.packed"]
    file = copy / "graphs" / ref.location
    data = bytearray(file.read_bytes())
    data[ref.offset + 7] ^= 1  # one step of one weight
    file.write_bytes(data)
    redigest(copy)
    result = run("verify", copy, "--against", quantised)
    assert result.exit_code == 3
    assert "quantised block_02: steps" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wide": []}, "has no weight 'head.packed'|such a model has no weight 'head'"),
        ({"wide": [HEAD, "block_01/mlp.up.weight"]}, "contradicts manifest.json"),
    ],
)
def test_a_manifest_that_says_otherwise(
    built: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy.ojfa"))
    edit_manifest(copy, lambda fields: fields["weights"].update(change))
    with pytest.raises(BundleError, match=message):
        Bundle(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int8"}, r"weights int8 is asked for, but this checkpoint's weights are int4"),
        ({"weights": "int4", "group_size": 16}, "group-size 16 is asked for, but this checkpoint"),
    ],
)
def test_what_it_has_is_not_made_again(
    options: Options, quantised: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan(options(checkpoint=str(quantised), **changes))
    assert caught.value.hint
    same = plan(options(checkpoint=str(quantised), weights="int4", group_size=32))["settings"]
    assert same == plan(options(checkpoint=str(quantised)))["settings"]
    assert same["weights"] == "int4"


class OtherBackend:
    """A backend that runs no quantised weights."""

    name = "onnxruntime-cuda"


def test_a_backend_that_runs_none(
    options: Options, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "load", lambda _: OtherBackend())
    with pytest.raises(BackendError, match="which the onnxruntime-cuda backend doesn't run"):
        plan(options(checkpoint=str(quantised), backend="onnxruntime-cuda"))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_beside_them(options: Options, quantised: Path, precision: str) -> None:
    said = f"int4 in groups of 32 with zero points beside {precision}, which the onnxruntime"
    with pytest.raises(BackendError, match=said) as caught:
        plan(options(checkpoint=str(quantised), precision=precision))
    assert "--precision fp32" in str(caught.value.hint)


def test_damage_is_found_before_anything_is_written(
    options: Options, quantised: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(quantised, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.scales"][0, 5] = torch.nan
    save_file(tensors, copy / "model.safetensors")
    asked = options(checkpoint=str(copy))
    with pytest.raises(CheckpointError, match=r"layers.3.mlp.up_proj.scales' in .* holds NaN"):
        build(asked)
    assert list(tmp_path.glob("out*")) == []


def test_fp8_is_built_in_fp32(
    calibration_text: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Compared with transformers' own dequantised model, as users load it."""

    def layer(_name: str, outputs: int, inputs: int) -> Any:
        numbers = float8(rng, outputs, inputs)
        scales = rng.uniform(0.06, 0.12, (outputs // 32, inputs // 32)).astype(np.float32)
        tensors = {"weight": float8_tensor(numbers), "weight_scale_inv": torch.from_numpy(scales)}
        return tensors, scaled_weights(numbers, scales, (32, 32))

    config = {"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3"}
    checkpoint = write_checkpoint("llama-gqa", tmp_path / "fp8", layer, config)
    bundle = tmp_path / "fp8.ojfa"
    arguments = (
        "build", checkpoint, "-o", bundle, "--rank", 8, "--shortcut", "ojfa",
        "--calibration-data", calibration_text, "--calibration-tokens", 1024,
        "--max-cache-length", 64,
    )  # fmt: skip
    result = run(*arguments, "--weights", "int4")
    assert result.exit_code == 2
    assert "this checkpoint's weights are 8-bit floats already (fp8)" in result.stderr
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "checks passed" in result.stdout
    assert "weights: fp32, the checkpoint's own (fp8)" in result.stdout
    shown = " ".join(run("inspect", bundle).stdout.split())
    assert "weights fp32, exactly what the checkpoint's (fp8) are" in shown
    assert "weights" not in json.loads((bundle / "manifest.json").read_text())
