"""Graphs and engines of quantised checkpoints, against the weights that their numbers stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from chain import Chain, build_chain
from quantised_checkpoints import (
    awq_config,
    awq_layer,
    compressed_config,
    float8,
    float8_tensor,
    float_rows,
    gptq_config,
    gptq_layer,
    gptq_tensors,
    int8_tensors,
    packed_tensors,
    random_matrix,
    scaled_weights,
    write_checkpoint,
)
from tiny_models import VOCAB_SIZE
from tolerances import LOGITS_FP32

from ojfa_export import backends
from ojfa_export.backends.onnxruntime.portable import PortableGraphs
from ojfa_export.bundle.names import block_name, graph_names
from ojfa_export.bundle.weight_format import (
    BLOCK_MATRICES,
    ORDER,
    PACKED,
    WeightFormat,
    dequantise,
    matrix_of,
)
from ojfa_export.errors import CheckpointError
from ojfa_export.graphs.kept import kept_weights
from ojfa_export.graphs.quantised import format_of
from ojfa_export.graphs.weights import map_tensors, references
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.planning.traffic import block_bytes
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.blocks import make_subject, verify_blocks
from ojfa_export.verify.reference import TransformersReference, reference_of
from ojfa_export.verify.whole_model import load_whole

LENGTH = 24
HEAD = "final_head/head"


def gptq(rng: np.random.Generator, bits: int, size: int, **how: Any) -> tuple[Any, Any]:
    form = "gptq" if how.get("first_format", True) else "gptq_v2"
    return gptq_layer(rng, bits, size, **how), gptq_config(bits, size, checkpoint_format=form)


def awq(rng: np.random.Generator, size: int) -> tuple[Any, Any]:
    return awq_layer(rng, size), awq_config(size)


def packed(rng: np.random.Generator, size: int, **how: Any) -> tuple[Any, Any]:
    def layer(_name: str, outputs: int, inputs: int) -> Any:
        matrix = random_matrix(rng, outputs, inputs, 4, size, **how)
        tensors = packed_tensors(matrix, with_points=not how.get("symmetric"))
        return tensors, matrix.weights()

    symmetric = how.get("symmetric", False)
    weights = {"strategy": "group", "group_size": size, "symmetric": symmetric}
    return layer, compressed_config("pack-quantized", **weights)


def channels(rng: np.random.Generator) -> tuple[Any, Any]:
    """Eight bits, a scale for each output, and activations that are rounded elsewhere."""

    def layer(_name: str, outputs: int, inputs: int) -> Any:
        matrix = random_matrix(rng, outputs, inputs, 8, -1, symmetric=True)
        return int8_tensors(matrix, with_points=False), matrix.weights()

    config = compressed_config("int-quantized", num_bits=8, strategy="channel")
    rounded = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    config["config_groups"]["group_0"]["input_activations"] = rounded
    return layer, config


def fp8(rng: np.random.Generator, *, exact: bool = False) -> tuple[Any, Any]:
    """Eight-bit floats; exact in bf16 where the scales are powers of two."""

    def layer(_name: str, outputs: int, inputs: int) -> Any:
        block = (32, 32)
        numbers, shape = float8(rng, outputs, inputs), (outputs // 32, inputs // 32)
        scales = rng.uniform(0.06, 0.12, shape).astype(np.float32)
        if exact:
            scales = np.exp2(np.round(np.log2(scales)))
        tensors = {"weight": float8_tensor(numbers), "weight_scale_inv": torch.from_numpy(scales)}
        return tensors, scaled_weights(numbers, scales, block)

    return layer, {"quant_method": "fp8", "weight_block_size": [32, 32], "fmt": "e4m3"}


INT4 = {"storage": "int4", "group_size": 32}
FP8 = {"storage": "fp8", "group_size": 32}
# The model, its layers, and what a bundle stores them as.
CASES: dict[str, tuple[str, Any, dict[str, Any] | None]] = {
    "gptq": ("llama-gqa", lambda rng: gptq(rng, 4, 32), {**INT4, "zero_points": True}),
    "gptq 8 bits": (
        "llama-tied",
        lambda rng: gptq(rng, 8, 16, first_format=False),
        {"storage": "int8", "group_size": 16, "zero_points": True},
    ),
    "gptq 3 bits, fused": ("phi3", lambda rng: gptq(rng, 3, 32), {**INT4, "zero_points": True}),
    "gptq act-order": (
        "llama-gqa",
        lambda rng: gptq(rng, 4, 32, act_order=True),
        {**INT4, "zero_points": True},
    ),
    "gptq by head": ("gpt_neox", lambda rng: gptq(rng, 4, -1), {**INT4, "zero_points": True}),
    "gptq transposed": (
        "gpt2",
        lambda rng: gptq(rng, 4, 64),
        {**INT4, "group_size": 64, "zero_points": True},
    ),
    "gptq multiplied": ("granite", lambda rng: gptq(rng, 4, 32), {**INT4, "zero_points": True}),
    "awq": ("qwen2", lambda rng: awq(rng, 32), {**INT4, "zero_points": True}),
    "packed": ("llama", lambda rng: packed(rng, 32), {**INT4, "zero_points": True}),
    "packed symmetric": ("qwen3", lambda rng: packed(rng, 32, symmetric=True), INT4),
    "int8 by output": (
        "gemma2",
        channels,
        {"storage": "int8", "group_size": 32},
    ),
    "fp8": ("llama-gqa", fp8, None),
    # On a GPU that runs them: by block; queries, keys and values put in order; and multiplied.
    "fp8 kept": ("llama-gqa", fp8, FP8),
    "fp8 kept by head": ("gpt_neox", float_rows, FP8),
    "fp8 kept, multiplied": ("granite", float_rows, FP8),
}


def chain_of(name: str, tmp_path: Path, rng: np.random.Generator) -> tuple[Chain, Path]:
    """The exported checkpoint, and a plain one of the same weights."""
    model, make, _ = CASES[name]
    quantised = write_checkpoint(model, tmp_path / "checkpoints", *make(rng))
    float_groups = (32,) if "fp8 kept" in name else ()
    chain = build_chain(quantised, tmp_path, rank=32, float_groups=float_groups)
    return chain, quantised.parent / "plain"


@pytest.mark.parametrize("name", CASES)
def test_weights_and_logits_are_those_of_a_plain_checkpoint(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    chain, plain_directory = chain_of(name, tmp_path, rng)
    plain = Checkpoint(plain_directory)
    form = chain.weights
    expected = CASES[name][2]
    assert form == (None if expected is None else WeightFormat(**expected, wide=(HEAD,)))
    spec, family = chain.spec, chain.checkpoint.family
    for index in range(spec.blocks):
        sources = family.block(plain.config, spec, index)
        model = onnx.load(chain.graphs / f"{block_name(index)}.onnx", load_external_data=False)
        tensors = map_tensors(model, chain.graphs)
        assert format_of(model) == (form and form.model_copy(update={"wide": ()}))
        for key, source in sources.items():
            matrix = matrix_of(tensors, key)
            assert (matrix is not None) == (form is not None and key in BLOCK_MATRICES)
            stored = tensors[key] if matrix is None else dequantise(matrix, form).T
            # Scales that a family multiplies are rounded once more.
            close = 2e-7 if source.scale != 1 and matrix is not None else 0
            np.testing.assert_allclose(stored, plain.read(source), rtol=close, atol=0)
    logits = run_portable(chain, rng)
    token_ids = logits.pop("token_ids")
    theirs = TransformersReference(plain_directory).forward(token_ids, lambda *_: None)
    close = LOGITS_FP32 * max(1, float(np.abs(theirs).max()) / 20)
    np.testing.assert_allclose(logits.pop("full"), theirs, atol=close, rtol=0)


def run_portable(chain: Chain, rng: np.random.Generator) -> dict[str, Any]:
    """Logits of the portable graphs on random tokens, whose products round nothing to 8 bits."""
    spec, graphs = chain.spec, PortableGraphs(chain.spec, chain.graphs)
    ids = rng.integers(VOCAB_SIZE, size=(2, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape).copy()
    hidden, rotations = graphs.embed(ids, positions, long_context=False)
    for index in range(spec.blocks):
        hidden, _ = graphs.block(index, hidden, positions, rotations)
    rows = graphs.logits(hidden.reshape(-1, spec.hidden_size), spec.blocks)
    return {"token_ids": ids, "full": rows.reshape(2, LENGTH, -1)}


@pytest.mark.parametrize("name", ["gptq act-order", "packed symmetric", "gptq by head", "fp8"])
def test_engines_equal_float64(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    chain, _ = chain_of(name, tmp_path, rng)
    ids = rng.integers(VOCAB_SIZE, size=(2, LENGTH)).astype(np.int32)
    rotary = chain.checkpoint.family.rotary(chain.checkpoint.config)
    subject = make_subject(
        chain.spec, "fp32" if name == "fp8" else "int8", chain.graphs,
        rotary.tables(chain.max_length) if rotary else None, chain.shortcut,
        chain.open_engines(), backends.load("onnxruntime"),
    )  # fmt: skip
    assert [check for check in verify_blocks(subject, ids, SILENT) if not check.passed] == []


@pytest.mark.parametrize("name", ["gptq", "fp8", "gptq transposed"])
def test_references_have_the_same_weights(
    name: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """What a bundle is verified against: block by block, and whole as transformers loads it."""
    model, make, _ = CASES[name]
    quantised = write_checkpoint(model, tmp_path, *make(rng))
    checkpoint = Checkpoint(quantised)
    ids = rng.integers(VOCAB_SIZE, size=(2, LENGTH)).astype(np.int32)
    expected = TransformersReference(tmp_path / "plain").forward(ids, lambda *_: None)
    found = reference_of(checkpoint).forward(ids, lambda *_: None)
    np.testing.assert_array_equal(found, expected)
    whole = load_whole(checkpoint, torch.float32)
    with torch.inference_mode():
        logits = whole(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=LOGITS_FP32, rtol=0)


def test_what_is_no_matrix_of_numbers_stays_wide(rng: np.random.Generator, tmp_path: Path) -> None:
    """Layers that weren't quantised, queries and keys in other orders, and groups too small."""
    matrices: dict[str, Any] = {}

    def layer(name: str, outputs: int, inputs: int) -> Any:
        if "layers.1.mlp.down_proj" in name:
            return None
        size = 8 if "layers.2.self_attn.o_proj" in name else 16 if "layers.3.mlp" in name else 32
        bits = 2 if "layers.3" in name else 4
        act_order = "layers.0.self_attn" in name  # each its own
        matrix = random_matrix(rng, outputs, inputs, bits, size, act_order=act_order)
        matrices[name] = matrix
        return gptq_tensors(matrix), matrix.weights()

    config = gptq_config(4, 32, dynamic={"+:.*": {}})
    quantised = write_checkpoint("llama", tmp_path / "checkpoints", layer, config)
    chain = build_chain(quantised, tmp_path, rank=32)
    wide = (
        "block_00/attention.qkv.weight",
        "block_01/mlp.down.weight",
        "block_02/attention.out.weight",
        HEAD,
    )
    assert chain.weights == WeightFormat(storage="int4", group_size=16, zero_points=True, wide=wide)
    for name in graph_names(chain.spec.blocks):
        model = onnx.load(chain.graphs / f"{name}.onnx", load_external_data=False)
        refs = references(model)
        for key in BLOCK_MATRICES if name.startswith("block") else ():
            assert (key in refs) == (f"{name}/{key}" in wide)
            assert (key + PACKED in refs) == (f"{name}/{key}" not in wide)
            assert (key + ORDER in refs) == (f"{name}/{key}" == "block_00/attention.out.weight")
    for index in range(chain.spec.blocks):
        written = (chain.graphs / f"{block_name(index)}.bin").stat().st_size
        # Tensors are aligned to 64 bytes, rows of zero points and an order are not counted.
        assert 0 <= written - block_bytes(chain.spec, chain.weights, index) < 4000
    logits = run_portable(chain, rng)
    plain = TransformersReference(quantised.parent / "plain")
    theirs = plain.forward(logits["token_ids"], lambda *_: None)
    np.testing.assert_allclose(logits["full"], theirs, atol=LOGITS_FP32, rtol=0)


def test_a_quantised_head_is_kept(rng: np.random.Generator, tmp_path: Path) -> None:
    made = gptq_layer(rng, 4, 32)
    quantised = write_checkpoint("llama", tmp_path / "checkpoints", made, gptq_config(4, 32))
    from safetensors.torch import load_file, save_file

    matrix = random_matrix(rng, VOCAB_SIZE, 64, 4, 32)
    stored = load_file(quantised / "model.safetensors")
    del stored["lm_head.weight"]
    stored |= {f"lm_head.{end}": each for end, each in gptq_tensors(matrix).items()}
    save_file(stored, quantised / "model.safetensors")
    chain = build_chain(quantised, tmp_path, rank=32)
    assert chain.weights is not None
    assert chain.weights.wide == ()
    model = onnx.load(chain.graphs / "final_head.onnx", load_external_data=False)
    head = matrix_of(map_tensors(model, chain.graphs), "head")
    assert head is not None
    np.testing.assert_array_equal(dequantise(head, chain.weights), matrix.weights())


@pytest.mark.parametrize("exact", [True, False])
def test_fp8_in_16_bits_only_where_that_is_exact(
    exact: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    quantised = write_checkpoint("llama", tmp_path / "checkpoints", *fp8(rng, exact=exact))
    assert kept_weights(Checkpoint(quantised)) is None
    if exact:
        assert build_chain(quantised, tmp_path, precision="bf16").weights is None
        return
    with pytest.raises(CheckpointError, match=r"weights of .* are not exact in bf16") as caught:
        build_chain(quantised, tmp_path, precision="bf16")
    assert "--precision fp32" in str(caught.value.hint)


def test_quantised_without_a_word_in_the_config(rng: np.random.Generator, tmp_path: Path) -> None:
    quantised = write_checkpoint("llama", tmp_path, gptq_layer(rng, 4, 32), gptq_config(4, 32))
    (quantised / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"but its config.json has no quantization_config"):
        Checkpoint(quantised).check_tensors()
