"""Layouts of quantised checkpoints, against matrices packed number by number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_checkpoints import (
    Matrix,
    awq_config,
    awq_tensors,
    compressed_config,
    float8,
    float8_tensor,
    gptq_config,
    gptq_tensors,
    int8_tensors,
    packed_tensors,
    random_matrix,
    scaled_weights,
)
from safetensors.torch import save_file

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.quantised import read_layout
from ojfa_export.models.checkpoint.quantised.kept import Kept, Scaled, beside
from ojfa_export.models.checkpoint.quantised.layout import MatrixTensors
from ojfa_export.models.checkpoint.torch_file import read_torch_file
from ojfa_export.models.families.config import Config

groupings = st.sampled_from([(32, 64), (64, 64), (-1, 96), (16, 96), (8, 32), (32, 32)])
seeds = st.integers(0, 2**31)


def read(directory: Path, fields: dict[str, Any], tensors: Any, shape: tuple[int, int]) -> Any:
    """A layer's matrix of [outputs, inputs], saved and read."""
    layout = read_layout(Config({"quantization_config": fields}, "config.json"))
    assert layout is not None
    path = directory / "model.safetensors"
    named = {f"layer.{end}": tensor for end, tensor in tensors.items()}
    save_file(named, path)
    files = dict.fromkeys(named, path)
    assert layout.holds("layer", files)
    assert not layout.holds("other", files)
    return layout.read(MatrixTensors("layer", files, directory), shape[1], shape[0])


def assert_same(kept: Any, matrix: Matrix) -> None:
    """All that a matrix is, exactly."""
    assert isinstance(kept, Kept)
    assert kept.bits == matrix.bits
    np.testing.assert_array_equal(kept.numbers(), matrix.numbers)
    np.testing.assert_array_equal(kept.group_of, matrix.group_of)
    np.testing.assert_array_equal(kept.scales, matrix.scales)
    np.testing.assert_array_equal(kept.zero_points, matrix.points)
    np.testing.assert_array_equal(kept.dequantised(), matrix.weights())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), grouping=groupings, seed=seeds,
    first_format=st.booleans(), act_order=st.booleans(), dynamic=st.booleans(),
)  # fmt: skip
def test_gptq(
    tmp_path_factory: Any, bits: int, grouping: tuple[int, int], seed: int,
    first_format: bool, act_order: bool, dynamic: bool,
) -> None:  # fmt: skip
    rng, (size, inputs) = np.random.default_rng(seed), grouping
    matrix = random_matrix(rng, 32, inputs, bits, size, act_order=act_order)
    fields = gptq_config(bits, size, checkpoint_format="gptq" if first_format else "gptq_v2")
    if dynamic:  # what layers have is not what the config says of all
        fields |= {"bits": 8, "group_size": 4, "dynamic": {"+:.*": {"bits": bits}}}
    tensors = gptq_tensors(matrix, first_format=first_format)
    assert_same(read(tmp_path_factory.mktemp("gptq"), fields, tensors, (32, inputs)), matrix)


@settings(max_examples=20, deadline=None)
@given(grouping=groupings, seed=seeds)
def test_awq(tmp_path_factory: Any, grouping: tuple[int, int], seed: int) -> None:
    size, inputs = grouping
    matrix = random_matrix(np.random.default_rng(seed), 24, inputs, 4, size)
    directory = tmp_path_factory.mktemp("awq")
    kept = read(directory, awq_config(size), awq_tensors(matrix), (24, inputs))
    assert_same(kept, matrix)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 8]), grouping=groupings, seed=seeds,
    symmetric=st.booleans(), packed_points=st.booleans(), act_order=st.booleans(),
)  # fmt: skip
def test_pack_quantized(
    tmp_path_factory: Any, bits: int, grouping: tuple[int, int], seed: int,
    symmetric: bool, packed_points: bool, act_order: bool,
) -> None:  # fmt: skip
    rng, (size, inputs) = np.random.default_rng(seed), grouping
    matrix = random_matrix(rng, 20, inputs, bits, size, symmetric=symmetric, act_order=act_order)
    fields = compressed_config(
        "pack-quantized", num_bits=bits, symmetric=symmetric,
        strategy="channel" if size == -1 else "group", group_size=None if size == -1 else size,
    )  # fmt: skip
    tensors = packed_tensors(matrix, with_points=not symmetric, packed_points=packed_points)
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(matrix.group_of.astype(np.int32))
    kept = read(tmp_path_factory.mktemp("packed"), fields, tensors, (20, inputs))
    assert_same(kept, matrix)


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([4, 8]), grouping=groupings, seed=seeds, symmetric=st.booleans())
def test_int_quantized(
    tmp_path_factory: Any, bits: int, grouping: tuple[int, int], seed: int, symmetric: bool
) -> None:
    rng, (size, inputs) = np.random.default_rng(seed), grouping
    matrix = random_matrix(rng, 20, inputs, bits, size, symmetric=symmetric)
    fields = compressed_config(
        "int-quantized", num_bits=bits, symmetric=symmetric,
        strategy="channel" if size == -1 else "group", group_size=None if size == -1 else size,
    )  # fmt: skip
    tensors = int8_tensors(matrix, with_points=not symmetric)
    kept = read(tmp_path_factory.mktemp("int"), fields, tensors, (20, inputs))
    assert_same(kept, matrix)


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_LAYOUTS = {
    "blocks": ({**FP8_CONFIG, "weight_block_size": [16, 32]}, "weight_scale_inv", (16, 32)),
    "tensor": (FP8_CONFIG, "weight_scale", (40, 80)),
    "rows": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (1, 80)),
    "compressed rows": (
        compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"),
        "weight_scale",
        (1, 80),
    ),
    "compressed blocks": (
        compressed_config(
            "float-quantized", num_bits=8, type="float", strategy="block",
            block_structure=[16, 32],
        ),
        "weight_scale",
        (16, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FP8_LAYOUTS)
def test_fp8(name: str, dtype: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    """Blocks at the edges are cut off."""
    fields, end, block = FP8_LAYOUTS[name]
    numbers = float8(rng, 40, 80)
    shape = -(-40 // block[0]), -(-80 // block[1])
    scales = rng.uniform(0.01, 0.1, shape).astype(dtype)
    stored = torch.from_numpy(scales.astype(np.float32))
    stored = stored.to(torch.bfloat16) if dtype != np.float32 else stored
    tensors = {"weight": float8_tensor(numbers), end: stored}
    scaled = read(tmp_path, fields, tensors, (40, 80))
    assert isinstance(scaled, Scaled)
    expected = scaled_weights(numbers, scales, block)
    np.testing.assert_array_equal(scaled.dequantised(), expected)
    size = math.gcd(block[1], 80)
    by_group = np.repeat(scaled.scales_of(size), size, axis=1)
    np.testing.assert_array_equal(numbers.astype(np.float32) * by_group, expected)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_an_8_bit_float_that_is_none(code: int, rng: np.random.Generator, tmp_path: Path) -> None:
    tensors = {"weight": float8_tensor(float8(rng, 8, 16)), "weight_scale": torch.ones(1)}
    tensors["weight"].view(torch.uint8)[3, 5] = code
    scaled = read(tmp_path, {"quant_method": "fp8"}, tensors, (8, 16))
    with pytest.raises(CheckpointError, match=r"tensor 'layer.weight' in .* holds NaN") as caught:
        scaled.dequantised()
    assert caught.value.hint == "the checkpoint is damaged; get a sound one"


@settings(max_examples=40, deadline=None)
@given(
    forms=st.lists(
        st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 64, -1])),
        min_size=1, max_size=3,
    ),
    seed=seeds, act_order=st.booleans(),
)  # fmt: skip
def test_matrices_beside_each_other(
    forms: list[tuple[int, int]], seed: int, act_order: bool
) -> None:
    """They stand for the same weights, whatever bits and groups each had."""
    rng = np.random.default_rng(seed)
    matrices = [random_matrix(rng, 5, 64, bits, size, act_order=act_order) for bits, size in forms]
    parts = [
        Kept(
            m.bits, m.scales.astype(np.float32), m.points.astype(np.uint8),
            m.group_of.astype(np.int32), lambda m=m: m.numbers.astype(np.uint8),
        )
        for m in matrices
    ]  # fmt: skip
    whole = beside(parts)
    orders = {m.group_of.tobytes() for m in matrices}
    if whole is None:
        assert act_order
        assert len(orders) > 1
        return
    expected = np.concatenate([m.weights() for m in matrices])
    np.testing.assert_array_equal(whole.dequantised(), expected)
    ready = whole.widened(8).in_order().split(16)
    order = np.arange(64) if whole.order is None else whole.order
    np.testing.assert_array_equal(ready.dequantised(), expected[:, order])
    np.testing.assert_array_equal(ready.group_of, np.arange(64) // 16)


def damaged(rng: np.random.Generator, **changes: Any) -> dict[str, torch.Tensor]:
    """GPTQ tensors of [32, 64] in groups of 32, some of them others, or left out."""
    tensors = gptq_tensors(random_matrix(rng, 32, 64, 4, 32))
    for end, change in changes.items():
        if change is None:
            del tensors[end]
        else:
            tensors[end] = change(tensors[end].clone())
    return tensors


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 3] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qzeros": None}, "tensor 'layer.qzeros' is missing in "),
        ({"scales": None}, "tensor 'layer.scales' is missing in "),
        ({"scales": with_nan}, "'layer.scales' in .* holds NaN or infinity"),
        ({"qweight": lambda t: t.to(torch.int64)}, "'layer.qweight' in .* has dtype I64, expected"),
        ({"qweight": lambda t: t[:4].clone()}, r"has shape \[4, 32\], expected \[8, 32\]"),
        ({"qzeros": lambda t: t[:, :2].clone()}, r"has shape \[2, 2\], expected \[2, 4\]"),
        ({"scales": lambda t: t[:1].clone()}, r"has shape \[1, 32\], expected \[2, 32\]"),
        ({"g_idx": lambda t: t + 1}, "'layer.g_idx' in .* names a group outside 0..1"),
        ({"g_idx": lambda t: t[:9].clone()}, r"has shape \[9\], expected \[64\]"),
    ],
)
def test_a_damaged_matrix(
    changes: Any, message: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, gptq_config(4, 32), damaged(rng, **changes), (32, 64))
    assert caught.value.hint
    assert "\n" not in caught.value.message


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes', which is not read"),
        ({"quant_method": ["gptq"]}, "quantised by .*, which is not read"),
        (gptq_config(5, 32), "'bits' is 5, which is not supported"),
        (gptq_config(4, 0), "'group_size' must be a positive integer or -1, not 0"),
        (gptq_config(4, 32, checkpoint_format="marlin"), "'checkpoint_format' is 'marlin'"),
        (gptq_config(4, 32, pack_dtype="int64"), "'pack_dtype' is 'int64'"),
        (gptq_config(4, 32, brand_new=1), "quantization_config: fields not understood: brand_new"),
        (awq_config(32, version="gemv"), "'version' is 'gemv'"),
        (awq_config(32, zero_point=False), "'zero_point' is False"),
        (awq_config(32, bits=3), "'bits' is 3"),
        (compressed_config("nvfp4-pack-quantized"), "'format' is 'nvfp4-pack-quantized'"),
        (compressed_config("pack-quantized", num_bits=9), "'num_bits' must be a positive integer"),
        (compressed_config("pack-quantized", actors=1), "weights: fields not understood: actors"),
        (compressed_config("float-quantized", **FLOAT8, symmetric=False), "'symmetric' is False"),
        ({**compressed_config("pack-quantized"), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache"),
        ({**compressed_config("pack-quantized"), "config_groups": {}}, "'config_groups' must be"),
        ({**compressed_config("dense")}, "'format' is 'dense'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "a list of two positive integers"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'fmt' is 'e5m2'"),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_layout(Config({"quantization_config": fields}, "config.json"))
    assert caught.value.message.startswith("config.json")
    assert caught.value.hint
    assert "\n" not in caught.value.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
    | st.sampled_from(["gptq", "gemm", "group", "block", "channel", "int", "float", "e4m3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)  # fmt: skip
METHODS = [
    gptq_config(4, 32, checkpoint_format="gptq", dynamic=None, pack_dtype="int32"),
    awq_config(32),
    compressed_config("pack-quantized", strategy="group", group_size=32),
    {**compressed_config("float-quantized", **FLOAT8), "sparsity_config": {"format": "dense"}},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
]


@settings(max_examples=200, deadline=None)
@given(fields=st.sampled_from(METHODS), data=st.data())
def test_any_config_is_read_or_refused(fields: dict[str, Any], data: Any) -> None:
    """Whatever a field holds, at any depth, what is raised names the file."""
    changed = json.loads(json.dumps(fields))
    place = changed
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            place[key] = data.draw(VALUES)
            break
        place = place[key]
    refused = None
    try:
        read_layout(Config({"quantization_config": changed}, "config.json"))
    except CheckpointError as error:
        refused = error
    if refused is not None:
        assert refused.message.startswith("config.json")
        assert refused.hint


def test_an_ignored_field() -> None:
    fields = gptq_config(4, 32, brand_new=1)
    name = "quantization_config.brand_new"
    assert read_layout(Config({"quantization_config": fields}, "config.json", [name])) is not None


def test_torch_files(rng: np.random.Generator, tmp_path: Path) -> None:
    """Whole numbers are read from torch's files too; 8-bit floats aren't, and it says so."""
    path = tmp_path / "pytorch_model.bin"

    def read_bin(fields: dict[str, Any], tensors: Any) -> Any:
        named = {f"layer.{end}": tensor for end, tensor in tensors.items()}
        torch.save(named, path)
        layout = read_layout(Config({"quantization_config": fields}, "config.json"))
        assert layout is not None
        return layout.read(MatrixTensors("layer", dict.fromkeys(named, path), tmp_path), 64, 32)

    matrix = random_matrix(rng, 32, 64, 4, 32)
    assert_same(read_bin(gptq_config(4, 32), gptq_tensors(matrix)), matrix)
    tensors = {"weight": float8_tensor(float8(rng, 32, 64)), "weight_scale": torch.ones(1)}
    read_torch_file.cache_clear()
    with pytest.raises(CheckpointError, match="float8_e4m3fn, which is not supported") as caught:
        read_bin(FP8_CONFIG, tensors)
    assert "safetensors" in str(caught.value.hint)


def test_groups_that_divide_nothing(rng: np.random.Generator, tmp_path: Path) -> None:
    matrix = random_matrix(rng, 32, 96, 4, 32)
    with pytest.raises(CheckpointError, match="96 inputs, no multiple of the group size 64"):
        read(tmp_path, gptq_config(4, 64), gptq_tensors(matrix), (32, 96))
    fields = compressed_config("pack-quantized", strategy="group", group_size=36)
    tensors = packed_tensors(matrix, with_points=False)  # three groups of 36 would be 108
    with pytest.raises(CheckpointError, match="groups of 36, which don't divide 96 features"):
        read(tmp_path, fields, tensors, (32, 96))


def test_schemes_beside_each_other(rng: np.random.Generator, tmp_path: Path) -> None:
    """Each layer has the scheme that its tensors are like; one that has none is named."""
    fields = compressed_config("mixed-precision", strategy="group", group_size=32)
    other = compressed_config("", num_bits=8, strategy="channel", symmetric=False)
    fields["config_groups"]["group_1"] = other["config_groups"]["group_0"]
    narrow = random_matrix(rng, 16, 64, 4, 32, symmetric=True)
    wide = random_matrix(rng, 16, 64, 8, -1)
    for matrix, tensors in (
        (narrow, packed_tensors(narrow, with_points=False)),
        (wide, int8_tensors(wide, with_points=True)),
    ):
        assert_same(read(tmp_path, fields, tensors, (16, 64)), matrix)
    for tensors in (
        packed_tensors(random_matrix(rng, 16, 64, 4, 16), with_points=False),
        int8_tensors(wide, with_points=False),
    ):
        with pytest.raises(CheckpointError, match="is what no scheme of config_groups gives"):
            read(tmp_path, fields, tensors, (16, 64))
