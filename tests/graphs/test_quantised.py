"""Quantised weights: what stored numbers stand for, and graphs on them against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from chain import Chain, build_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import VOCAB_SIZE, make_checkpoint
from tolerances import BLOCK_FP32_RELATIVE, LOGITS_FP32

from ojfa_export import backends
from ojfa_export.backends.onnxruntime.portable import PortableGraphs
from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.bundle.names import graph_names
from ojfa_export.bundle.weight_format import (
    ENDS,
    GROUP_SIZES,
    PACKED,
    QuantisedMatrix,
    WeightFormat,
    dequantise,
)
from ojfa_export.errors import CheckpointError
from ojfa_export.graphs.quantised import format_of
from ojfa_export.graphs.weights import references
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.blocks import make_subject, verify_blocks
from ojfa_export.verify.exact import HIDDEN, ExactModel

LENGTH = 24
INT4 = WeightFormat(storage="int4", group_size=32, zero_points=True)
OFFSETS = WeightFormat(storage="int4", group_size=32, zero_points=True, offsets=True)
INT8 = WeightFormat(storage="int8", group_size=32, zero_points=True)
FP8 = WeightFormat(storage="fp8", group_size=32)
# Two models, all storages, groups of other sizes, every shortcut, ranks of whole groups and not.
CHAINS = [
    ("gpt2", INT4, {"kind": "residual"}),
    ("gpt2", INT8, {"rank": 32}),
    ("llama-gqa", INT4, {"rank": 8}),
    ("llama-gqa", INT8, {"kind": "mlp"}),
    ("gpt2", FP8, {"kind": "residual"}),
    ("llama-tied", WeightFormat(storage="int4", group_size=16, zero_points=False), {"rank": 16}),
    ("gemma2", OFFSETS, {"kind": "residual"}),
    ("llama-gqa", OFFSETS.model_copy(update={"group_size": 16}), {"rank": 16}),
]

forms = st.builds(
    WeightFormat,
    storage=st.sampled_from(["int4", "int8"]),
    group_size=st.sampled_from(GROUP_SIZES),
    zero_points=st.booleans(),
)


def tables(chain: Chain):
    rotary = chain.checkpoint.family.rotary(chain.checkpoint.config)
    return rotary.tables(chain.max_length) if rotary else None


def written_out(matrix: QuantisedMatrix, form: WeightFormat) -> np.ndarray:
    """[inputs, outputs] by the formula, a number at a time."""
    outputs, groups, _ = matrix.packed.shape
    result = np.empty((groups * form.group_size, outputs))

    def number(row: np.ndarray, index: int) -> int:
        if form.bits == 8:
            return int(row[index])
        return int(row[index // 2]) >> 4 * (index % 2) & 15

    for output in range(outputs):
        row = matrix.packed[output].reshape(-1)
        for index in range(len(result)):
            group = index // form.group_size
            if matrix.zero_points is None:
                zero = 2 ** (form.bits - 1)
            else:
                zero = number(matrix.zero_points[output], group)
            scale = float(matrix.scales[output, group])
            result[index, output] = (number(row, index) - zero) * scale
    return result


@settings(max_examples=40, deadline=None)
@given(
    form=forms,
    groups=st.integers(1, 3),
    outputs=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 2.0, -50.0]),
    size=st.sampled_from([1e-6, 0.1, 1e3]),
    zeros=st.booleans(),
)
def test_weights_are_what_the_formula_says(form, groups, outputs, seed, offset, size, zeros):
    rng = np.random.default_rng(seed)
    shape = groups * form.group_size, outputs
    columns = (size * (offset + rng.normal(size=shape))).astype(np.float32)
    if zeros:
        columns[: form.group_size] = 0
    matrix = quantise(columns, form)
    expected = written_out(matrix, form)
    np.testing.assert_array_equal(dequantise(matrix, form, np.float64).T, expected)
    # In fp32 the product is rounded once.
    np.testing.assert_allclose(dequantise(matrix, form).T, expected, rtol=1e-7, atol=0)
    steps = np.repeat(np.abs(matrix.scales.astype(np.float64)), form.group_size, axis=1).T
    # Without zero points the range ends one step short on one side; and of a quotient of up to 255
    # steps fp32 rounds 2e-5 steps.
    most = 0.5 if form.zero_points else 1.0
    assert (np.abs(expected - columns) <= (most + 1e-3) * steps + 1e-30).all()


@pytest.mark.parametrize(("name", "form", "options"), CHAINS, ids=lambda each: str(each))
def test_graphs_and_engines_equal_float64(name, form, options, rng, tmp_path):
    """Portable graphs to fp32's rounding, engines to that of 8 bits; also in pieces."""
    seed = int(rng.integers(2**31))
    checkpoint = make_checkpoint(name, tmp_path / "checkpoint", seed=seed)
    chain = build_chain(checkpoint, tmp_path, seed=seed, weights=form, **options)
    ids = rng.integers(VOCAB_SIZE, size=(2, LENGTH)).astype(np.int32)
    subject = make_subject(
        chain.spec, "int8", chain.graphs, tables(chain), chain.shortcut,
        chain.open_engines(), backends.load("onnxruntime"),
    )  # fmt: skip
    assert [check for check in verify_blocks(subject, ids, SILENT) if not check.passed] == []
    exact = ExactModel(chain.spec, chain.graphs, tables(chain))
    graphs = PortableGraphs(chain.spec, chain.graphs)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape).copy()
    hidden, rotations = graphs.embed(ids, positions, long_context=False)
    for depth in range(1, chain.spec.blocks + 1):
        expected = exact.block(depth - 1, hidden.astype(np.float64))[HIDDEN]
        actual, _ = graphs.block(depth - 1, hidden, positions, rotations)
        close = BLOCK_FP32_RELATIVE * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=close, rtol=0)
        hidden = expected.astype(np.float32)
        rows = hidden.reshape(-1, chain.spec.hidden_size)
        logits = exact.logits(rows.astype(np.float64), depth)
        # A narrow exit enlarges the rounding of its input where its output is small.
        close = max(LOGITS_FP32, BLOCK_FP32_RELATIVE * np.abs(logits).max())
        np.testing.assert_allclose(graphs.logits(rows, depth), logits, atol=close, rtol=0)


@pytest.mark.parametrize("form", [INT4, OFFSETS])
def test_what_is_quantised_and_what_is_not(form, tmp_path):
    checkpoint = make_checkpoint("llama-tied", tmp_path / "checkpoint", seed=1)
    chain = build_chain(checkpoint, tmp_path, weights=form, rank=32)
    quantised = {}
    for name in graph_names(chain.spec.blocks):
        for path in (chain.graphs / f"{name}.onnx", chain.engine_files[name]):
            model = onnx.load(path, load_external_data=False)
            refs = references(model)
            quantised[name] = {key.removesuffix(PACKED) for key in refs if key.endswith(PACKED)}
            assert format_of(model) == (form if quantised[name] else None)
            assert not quantised[name] & set(refs)  # nothing is there twice
            for key, ref in refs.items():
                if not key.endswith(ENDS):
                    assert ref.dtype == onnx.TensorProto.FLOAT
    block = {f"{each}.weight" for each in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}
    assert quantised.pop("embed") == set()
    assert quantised.pop("final_head") == {"head"}
    assert quantised.pop("exit_head") == {"vocabulary"}
    assert all(found == block for found in quantised.values())


def test_an_exit_head_whose_rank_is_no_whole_group_is_kept(tmp_path):
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", seed=1)
    chain = build_chain(checkpoint, tmp_path, weights=INT4, rank=8)
    model = onnx.load(chain.graphs / "exit_head.onnx", load_external_data=False)
    assert set(references(model)) == {"project", "project.bias", "vocabulary"}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_weights_without_a_nearest_number(value, tensor, tmp_path):
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", seed=1)
    [file] = Path(checkpoint).glob("*.safetensors")
    tensors = load_file(file)
    tensors[tensor][3, 5] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"'{tensor}' in .* holds NaN or infinity") as caught:
        build_chain(checkpoint, tmp_path, weights=INT4)
    assert caught.value.hint
