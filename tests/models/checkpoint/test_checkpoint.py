"""Checkpoints in every layout give the same weights; damaged ones are refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, make_model

from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.torch_file import read_torch_file
from ojfa_export.models.families import FAMILIES

Fields = dict[str, Any]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint("llama-gqa", tmp_path / "sharded", seed=11, shards=3)


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every weight of the model, as float32."""
    family, config, spec = checkpoint.family, checkpoint.config, checkpoint.spec
    sources = dict(family.ends(config, spec))
    for index in range(spec.blocks):
        block = family.block(config, spec, index)
        sources |= {f"{index}.{name}": source for name, source in block.items()}
    return {name: checkpoint.read(source).astype(np.float32) for name, source in sources.items()}


def refused(directory: Path, match: str, *, names: str = "") -> CheckpointError:
    """Opening and reading all of it must end in an error that names the file, with a hint."""
    with pytest.raises(CheckpointError, match=match) as caught:
        weights(Checkpoint(directory))
    assert names or str(directory) in caught.value.message
    assert names in caught.value.message
    assert caught.value.hint
    return caught.value


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def edit_tensors(directory: Path, change: Callable[[Fields], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_equal_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    [
        {"shards": 3},
        {"format": "bin"},
        {"format": "bin", "shards": 2},
        {"config_style": "v4"},
    ],
    ids=str,
)
def test_layouts_give_equal_weights(tmp_path: Path, dtype: str, layout: Fields) -> None:
    plain = make_checkpoint("llama-gqa", tmp_path / "plain", seed=2, dtype=dtype)
    other = make_checkpoint("llama-gqa", tmp_path / "other", seed=2, dtype=dtype, **layout)
    assert Checkpoint(plain).spec == Checkpoint(other).spec
    assert_equal_weights(weights(Checkpoint(plain)), weights(Checkpoint(other)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_the_models(tmp_path: Path, dtype: str) -> None:
    directory = make_checkpoint("llama-gqa", tmp_path, seed=2, dtype=dtype)
    model = make_model("llama-gqa", seed=2).to(getattr(torch, dtype)).float()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    read = weights(Checkpoint(directory))
    np.testing.assert_array_equal(read["token_embedding"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(read["head"], state["lm_head.weight"])
    attention = "model.layers.2.self_attn."
    qkv = [state[f"{attention}{part}_proj.weight"].T for part in "qkv"]
    np.testing.assert_array_equal(read["2.attention.qkv.weight"], np.concatenate(qkv, axis=1))
    down = state["model.layers.2.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(read["2.mlp.down.weight"], down)


def test_hub_keys_without_prefix(tmp_path: Path) -> None:
    plain, hub_keys = (
        Checkpoint(make_checkpoint(name, tmp_path / name, seed=2))
        for name in ("gpt2", "gpt2-hub-keys")
    )
    assert_equal_weights(weights(plain), weights(hub_keys))


def test_torch_file_from_before_zip_archives(directory: Path) -> None:
    expected = weights(Checkpoint(directory))
    path = directory / "model.safetensors"
    torch.save(
        load_file(path), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    path.unlink()
    assert_equal_weights(weights(Checkpoint(directory)), expected)


def test_digest_is_of_config_and_weights(directory: Path) -> None:
    digest = Checkpoint(directory).sha256()
    (directory / "README.md").write_text("text")
    assert Checkpoint(directory).sha256() == digest
    edit(directory / "config.json", use_cache=False)
    changed = Checkpoint(directory).sha256()
    assert changed != digest
    edit_tensors(directory, lambda t: t["model.norm.weight"].add_(1))
    assert Checkpoint(directory).sha256() not in (digest, changed)


# Damaged weights


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, f"shard .*{shard.name} is missing, but model.safetensors.index.json")


def test_truncated_shard_is_refused_when_opened(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} can't be read"):
        Checkpoint(sharded)


@pytest.mark.parametrize("size", [0, 4, 100, 20_000])
def test_truncated_file(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(directory, r"model\.safetensors can't be read")


def test_shard_without_its_tensor(sharded: Path) -> None:
    one, other, *_ = sorted(sharded.glob("*.safetensors"))
    shutil.copy(one, other)
    refused(sharded, f"{other.name} lacks tensor 'model")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 5}, "x"])
def test_bad_index(sharded: Path, weight_map: Any) -> None:
    edit(sharded / "model.safetensors.index.json", weight_map=weight_map)
    refused(sharded, r"index\.json has no 'weight_map'")


def test_index_naming_a_missing_file_or_another_directory(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(next(sharded.glob("*.safetensors")), outside)
    for shard in ("none.safetensors", str(outside), f"../{outside.name}"):
        edit(path, weight_map={**weight_map, "model.norm.weight": shard})
        refused(sharded, f"shard {sharded / Path(shard).name} is missing")


def test_no_weights_and_no_config(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused(directory, "holds no model.safetensors or pytorch_model.bin")
    (directory / "config.json").unlink()
    refused(directory, "is not a checkpoint: it has no config.json")


def test_tensor_of_wrong_shape(directory: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(directory, lambda t: t.update({name: t[name][:-1].clone()}))
    refused(directory, rf"tensor '{name}' .* has shape \[95, 64\], expected \[96, 64\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensor_with_nan(directory: Path, value: float, dtype: torch.dtype) -> None:
    name = "model.layers.3.self_attn.k_proj.weight"

    def change(tensors: Fields) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][-1, -1] = value

    edit_tensors(directory, change)
    refused(directory, rf"tensor '{name}' in .*model\.safetensors holds NaN or infinity")


def test_missing_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.pop("model.layers.2.input_layernorm.weight"))
    refused(directory, r"tensor 'model\.layers\.2\.input_layernorm\.weight' is missing")


def test_tensor_of_integers(directory: Path) -> None:
    edit_tensors(
        directory, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    )
    error = refused(directory, "tensor 'model.norm.weight' .* has dtype I8")
    assert "dequantised" in str(error.hint)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin"])
def test_dtypes_are_checked_from_the_headers(
    directory: Path, layout: str, dtype: torch.dtype
) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors |= {name: tensors[name].to(dtype), "unused": torch.ones(3, dtype=dtype)}
    (directory / "model.safetensors").unlink()
    save = torch.save if layout.endswith(".bin") else save_file
    save(tensors, directory / layout)
    opened = Checkpoint(directory)
    with pytest.raises(
        CheckpointError, match=rf"tensor '{name}' in .*{layout} has dtype"
    ) as caught:
        opened.check_tensors()
    assert "dequantised" in str(caught.value.hint)


def test_damaged_checkpoint_leaves_nothing(
    directory: Path, calibration_text: Path, tmp_path: Path
) -> None:
    edit_tensors(directory, lambda t: t["model.layers.2.mlp.up_proj.weight"].fill_(torch.nan))
    output = tmp_path / "out" / "out.ojfa"
    options = BuildOptions(
        str(directory), output, calibration_data=(calibration_text,), calibration_tokens=1024
    )
    with pytest.raises(CheckpointError, match="holds NaN"):
        build(options)
    assert list(output.parent.iterdir()) == []


# Pickles


class _Payload:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code(directory: Path, tmp_path: Path, zipped: bool) -> None:
    (directory / "model.safetensors").unlink()
    path, proof = directory / "pytorch_model.bin", tmp_path / "proof"
    payload = {"model.norm.weight": torch.ones(64), "x": _Payload(proof)}
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    error = refused(directory, r"pytorch_model\.bin can't be loaded as weights only")
    assert "run code" in str(error.hint)
    assert not proof.exists()
    path.write_bytes(pickle.dumps(payload, protocol=2))  # torch's own protocol
    refused(directory, "can't be loaded as weights only")
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists()  # the payload was live


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_torch_file(tmp_path: Path, share: float) -> None:
    directory = make_checkpoint("llama-gqa", tmp_path, seed=1, format="bin")
    path = directory / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(directory, r"pytorch_model\.bin can't be loaded as weights only")


def test_torch_files_of_something_else(tmp_path: Path) -> None:
    for index, (value, match) in enumerate(
        [
            ([torch.ones(2)], "holds a list, not tensors by name"),
            ({"x": torch.ones(2).to(torch.float8_e4m3fn)}, "tensor 'x' .* has dtype .*float8"),
        ]
    ):
        path = tmp_path / f"{index}.bin"
        torch.save(value, path)
        with pytest.raises(CheckpointError, match=match) as caught:
            read_torch_file(path)
        assert caught.value.hint


# Configs


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_file_that_is_no_json_object(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(text)
    refused(directory, f"{name} (can't be read|must hold a JSON object)")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("model_type", "mamba", "model family 'mamba' is not supported"),
        ("model_type", None, "model family 'None' is not supported"),
        ("model_type", ["llama"], "model family .* is not supported"),
        ("attention_sink", 4, "fields not understood for family 'llama': attention_sink"),
        ("quantization_config", {"bits": 4}, "'quantization_config' must be an object that"),
        ("hidden_act", "gelu", "'hidden_act' is 'gelu', which is not supported"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rotary scaling 'yarn' is not"),
        ("rope_parameters", {"rope_type": "linear"}, "rotary scaling 'linear' lacks factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": "x"}, "'factor' must be a positive"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}, "'factor' must be a positive"),
        ("rope_parameters", {"rope_theta": "x"}, "'rope_theta' must be a positive number"),
        ("rope_parameters", {"mscale": 1.0}, "has unknown mscale"),
        ("rope_parameters", "linear", "'rope_parameters' must be an object"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "both 'rope_scaling' and"),
        ("num_hidden_layers", 10**30, "'num_hidden_layers' must be a positive integer"),
        ("hidden_size", "64", "'hidden_size' must be a positive integer, not '64'"),
        ("hidden_size", None, "'hidden_size' must be a positive integer, not None"),
        ("num_hidden_layers", 0, "'num_hidden_layers' must be a positive integer"),
        ("num_attention_heads", True, "'num_attention_heads' must be a positive integer"),
        ("num_key_value_heads", 3, "4 heads can't share 3 key-value heads"),
        ("attention_bias", "no", "'attention_bias' must be true or false"),
        ("rms_norm_eps", "small", "'rms_norm_eps' must be a real number"),
        ("rms_norm_eps", 10**400, "'rms_norm_eps' must be a real number from 0 to 1, not 1000"),
        ("rms_norm_eps", float("nan"), "'rms_norm_eps' must be a real number from 0 to 1, not nan"),
        ("rms_norm_eps", -1e-6, "'rms_norm_eps' must be a real number from 0 to 1, not -1e-06"),
        ("eos_token_id", "</s>", "'eos_token_id' must be a token id"),
        ("eos_token_id", [1, "x"], "'eos_token_id' must be a token id"),
    ],
)
def test_config_that_cannot_be_honoured(
    directory: Path, field: str, value: Any, match: str
) -> None:
    edit(directory / "config.json", **{field: value})
    error = refused(directory, match, names="config.json")
    if field == "model_type":
        assert error.hint == f"supported: {', '.join(sorted(FAMILIES))}"


def test_irrelevant_fields(directory: Path) -> None:
    spec = Checkpoint(directory).spec
    changes = {"attention_dropout": 0.1, "_name_or_path": "x", "torch_dtype": "float16"}
    edit(directory / "config.json", **changes, pretraining_tp=2, use_cache=False)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_field": None}))
    assert Checkpoint(directory).spec == spec


def test_config_of_another_size(directory: Path) -> None:
    edit(directory / "config.json", intermediate_size=128)
    refused(directory, r"expected \[128, 64\]")


@pytest.mark.parametrize(
    ("change", "match"),
    [({"intermediate_size": 128}, r"expected \[128, 64\]"), ({"num_hidden_layers": 9}, "missing")],
)
def test_shapes_are_checked_from_the_headers(
    directory: Path, change: dict[str, int], match: str
) -> None:
    Checkpoint(directory).check_tensors()
    edit(directory / "config.json", **change)
    with pytest.raises(CheckpointError, match=match):
        Checkpoint(directory).check_tensors()


@pytest.mark.parametrize(("value", "expected"), [(5, (5,)), ([7, 9], (7, 9)), (None, (0,))])
def test_end_of_text_ids(directory: Path, value: Any, expected: tuple[int, ...]) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert Checkpoint(directory).spec.eos_token_ids == expected
