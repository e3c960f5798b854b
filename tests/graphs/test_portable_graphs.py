"""The portable graphs: valid, standard, no weight twice, and equal to transformers."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from chain import build_chain
from onnx import TensorProto
from tiny_models import VARIANTS, VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_FP16_RELATIVE, LOGITS_FP32
from transformers import AutoModelForCausalLM

from ojfa_export.backends.onnxruntime.session import share_thread_pool
from ojfa_export.bundle.names import block_name, graph_names
from ojfa_export.graphs.weights import ALIGNMENT, DATA_TYPES, references

# A constant inside a graph is an index, a size or a scalar; a weight would be larger.
LARGEST_CONSTANT = 64


@pytest.fixture(params=VARIANTS)
def chain(request, rng, tmp_path):
    return make_chain(request.param, rng, tmp_path)


def make_chain(name, rng, tmp_path, **options):
    seed = int(rng.integers(2**31))
    checkpoint = make_checkpoint(name, tmp_path / "checkpoint", seed=seed)
    return build_chain(checkpoint, tmp_path, seed=seed, **options)


def load_all(chain):
    names = graph_names(chain.spec.blocks)
    return {
        name: onnx.load(chain.graphs / f"{name}.onnx", load_external_data=False) for name in names
    }


def assert_valid(chain, tmp_path):
    for name, model in load_all(chain).items():
        path = str(chain.graphs / f"{name}.onnx")
        onnx.checker.check_model(path, full_check=True)
        inferred_path = str(tmp_path / "inferred.onnx")
        onnx.shape_inference.infer_shapes_path(
            path, inferred_path, strict_mode=True, data_prop=True
        )
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
        assert {node.domain for node in model.graph.node} == {""}
        inferred = onnx.load(inferred_path, load_external_data=False).graph
        known = {value.name for value in (*inferred.value_info, *inferred.output)}
        assert {output for node in inferred.node for output in node.output} <= known
        assert model.graph.doc_string


def test_graphs_are_valid(chain, tmp_path):
    assert_valid(chain, tmp_path)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *[("gemma2", "fp16"), ("gemma3_text", "fp16"), ("gpt2", "fp16"), ("phi3-longrope", "fp16")],
        *[("gemma3_text", "bf16"), ("gpt2", "bf16")],
    ],
)
def test_graphs_of_16_bits_are_valid(name, precision, rng, tmp_path):
    chain = make_chain(name, rng, tmp_path, precision=precision)
    assert_valid(chain, tmp_path)
    types = {
        port.name: port.type.tensor_type.elem_type
        for port in load_all(chain)["block_00"].graph.input
    }
    assert types["past_key"] == types["past_value"] == DATA_TYPES[precision]
    assert types["hidden"] == TensorProto.FLOAT


def test_ids_and_positions_are_int32(chain):
    for model in load_all(chain).values():
        for port in model.graph.input:
            if port.name in ("token_ids", "positions", "long_context"):
                assert port.type.tensor_type.elem_type == TensorProto.INT32
            else:
                assert port.type.tensor_type.elem_type == TensorProto.FLOAT


def test_no_weight_is_stored_twice(chain):
    """Files hold tensors and alignment only, each tensor once; graphs hold none."""
    models = load_all(chain)
    models |= {
        f"engine {name}": onnx.load(path, load_external_data=False)
        for name, path in chain.engine_files.items()
    }
    ranges = {}
    for model in models.values():
        for initializer in model.graph.initializer:
            if initializer.data_location != TensorProto.EXTERNAL:
                assert int(np.prod(initializer.dims)) <= LARGEST_CONSTANT
        for ref in references(model).values():
            ranges.setdefault(ref.location, set()).add(
                (ref.offset, ref.length, ref.dtype, ref.dims)
            )
    assert set(ranges) == {path.name for path in chain.graphs.glob("*.bin")}
    contents = []
    for file, refs in ranges.items():
        data, end = (chain.graphs / file).read_bytes(), 0
        for offset, length, _, _ in sorted(refs):
            assert 0 <= offset - end < ALIGNMENT
            assert offset % ALIGNMENT == 0
            assert not any(data[end:offset])
            end = offset + length
            contents.append(hashlib.sha256(data[offset:end]).digest())
        assert end == len(data)
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma2-untied", "gpt2", "llama-tied", "phi3-tied", "gpt2-untied", "llama"]
)
def test_tied_head_is_the_embedding(name, rng, tmp_path):
    models = load_all(make_chain(name, rng, tmp_path))
    embedding = references(models["embed"])["token_embedding"]
    head = references(models["final_head"])["head"]
    tied = VARIANTS[name].build_config().tie_word_embeddings
    assert (head == embedding) == tied


class Stranger:
    """Runs the graphs from their names and ports alone, with a cache of its own.

    Keys and values lie in buffers longer than any sequence; what is not a sequence's own is
    garbage, as after a rewind or in a batch of sequences of different lengths.
    """

    def __init__(self, chain, batch, rng):
        share_thread_pool()
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        self.sessions = {
            name: ort.InferenceSession(str(chain.graphs / f"{name}.onnx"), options)
            for name in graph_names(chain.spec.blocks)
        }
        self.spec = chain.spec
        dtype = np.float16 if chain.precision == "fp16" else np.float32
        shape = (
            chain.spec.blocks,
            2,
            batch,
            chain.spec.kv_heads,
            chain.max_length,
            chain.spec.head_dim,
        )
        self.cache = (100 * rng.normal(size=shape)).astype(dtype)
        self.lengths = np.zeros(batch, np.int64)

    def run(self, name, **feeds):
        session = self.sessions[name]
        outputs = [port.name for port in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    def advance(self, token_ids, long_context=False):
        """New tokens [batch, tokens] to logits [batch, tokens, V]."""
        batch, count = token_ids.shape
        positions = (self.lengths[:, None] + np.arange(count)).astype(np.int32)
        long = {"long_context": np.array(long_context, np.int32)} if self.spec.rotary_switch else {}
        embedded = self.run(
            "embed", token_ids=token_ids.astype(np.int32), positions=positions, **long
        )
        hidden, past = embedded.pop("hidden"), self.lengths.max()
        for block, (keys, values) in enumerate(self.cache):
            outputs = self.run(
                block_name(block),
                hidden=hidden,
                positions=positions,
                past_key=keys[:, :, :past],
                past_value=values[:, :, :past],
                **embedded,
            )
            hidden = outputs["hidden_out"]
            for row, start in enumerate(self.lengths):
                keys[row, :, start : start + count] = outputs["key"][row]
                values[row, :, start : start + count] = outputs["value"][row]
        self.lengths += count
        flat = hidden.reshape(batch * count, -1)
        return self.run("final_head", hidden=flat)["logits"].reshape(batch, count, -1)


def reference_logits(chain, token_ids):
    model = AutoModelForCausalLM.from_pretrained(
        chain.checkpoint.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(token_ids), use_cache=False).logits.numpy()


def assert_ragged_batch_equals_transformers(chain, rng, tolerance):
    """Two sequences that were 13 and 5 tokens long go on together, several and single tokens."""
    # Within LongRoPE's and dynamic RoPE's switch length.
    ids = rng.integers(VOCAB_SIZE, size=(2, 30))
    expected = reference_logits(chain, ids)
    stranger = Stranger(chain, 2, rng)
    together = stranger.advance(ids[:, :13])
    np.testing.assert_allclose(together, expected[:, :13], atol=tolerance, rtol=0)
    stranger.lengths[1] = 5  # forgets eight tokens: their rows of the cache are garbage now
    stranger.cache[:, :, 1, :, 5:13] = 100 * rng.normal(size=stranger.cache[:, :, 1, :, 5:13].shape)
    for count in (4, 1, 1, 7):
        at = stranger.lengths[:, None] + np.arange(count)
        rows = np.arange(2)[:, None]
        actual = stranger.advance(ids[rows, at])
        np.testing.assert_allclose(actual, expected[rows, at], atol=tolerance, rtol=0)


def test_ragged_batch_equals_transformers(chain, rng):
    assert_ragged_batch_equals_transformers(chain, rng, LOGITS_FP32)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_fp16_ragged_batch_equals_transformers(name, rng, tmp_path):
    chain = make_chain(name, rng, tmp_path, precision="fp16")
    scale = np.abs(reference_logits(chain, rng.integers(VOCAB_SIZE, size=(2, 30)))).max()
    assert_ragged_batch_equals_transformers(chain, rng, LOGITS_FP16_RELATIVE * scale)


def test_long_context_equals_transformers(rng, tmp_path):
    """Beyond LongRoPE's switch length every position takes the long factors."""
    chain = make_chain("phi3-longrope", rng, tmp_path)
    ids = rng.integers(VOCAB_SIZE, size=(2, 50))
    stranger = Stranger(chain, 2, rng)
    pieces = [stranger.advance(ids[:, part], True) for part in (slice(20), slice(20, 50))]
    actual = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(actual, reference_logits(chain, ids), atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_exit_head_is_the_shortcut(name, rng, tmp_path):
    """Against shortcut, norm and head in float64, each from its own definition."""
    chain = make_chain(name, rng, tmp_path)
    hidden = (2 * rng.normal(size=(9, chain.spec.hidden_size))).astype(np.float32)
    jump = chain.shortcut
    y = (hidden.astype(np.float64) * jump.scale + jump.shift) @ jump.down @ jump.up
    logits = Stranger(chain, 1, rng).run("exit_head", hidden=hidden)["logits"]
    np.testing.assert_allclose(logits, head64(chain, y), atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "phi3"])
def test_exit_head_is_the_mlp(name, rng, tmp_path):
    """Against torch in float64; each row is of an exit of its own."""
    chain = make_chain(name, rng, tmp_path, kind="mlp")
    exits = rng.integers(1, chain.spec.blocks, size=9).astype(np.int32)
    hidden = (2 * rng.normal(size=(9, chain.spec.hidden_size))).astype(np.float32)
    y = np.concatenate(
        [mlp64(chain, row[None], exit) for row, exit in zip(hidden, exits, strict=True)]
    )
    run = Stranger(chain, 1, rng).run("exit_head", hidden=hidden, blocks_run=exits)
    np.testing.assert_allclose(run["logits"], head64(chain, y), atol=LOGITS_FP32, rtol=0)


def mlp64(chain, hidden, blocks_run):
    """The jump y = h + act(...) down as its definition says it, by torch."""
    jump, h = chain.shortcut, torch.from_numpy(hidden.astype(np.float64))
    scale, shift, up, down = (
        torch.from_numpy(np.asarray(getattr(jump, name), np.float64))
        for name in ("scale", "shift", "up", "down")
    )
    if chain.spec.norm == "layer":
        x = torch.layer_norm(h, h.shape[-1:], eps=chain.spec.norm_epsilon)
    else:
        x = torch.rms_norm(h, h.shape[-1:], eps=chain.spec.norm_epsilon)
    inner = (x * scale[blocks_run - 1] + shift[blocks_run - 1]) @ up
    if chain.spec.gated:
        gate, inner = inner.chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * inner
    else:
        inner = torch.nn.functional.gelu(inner, approximate="tanh")
    return (h + inner @ down).numpy()


def head64(chain, y):
    """Logits of hidden states by transformers' own norm and head."""
    model = AutoModelForCausalLM.from_pretrained(chain.checkpoint.directory, dtype=torch.float64)
    norm = model.base_model.ln_f if hasattr(model.base_model, "ln_f") else model.base_model.norm
    if chain.spec.norm == "rms":  # transformers' RMSNorm computes in fp32 whatever its input
        scaled = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + norm.variance_epsilon)
        normed = scaled * norm.weight.detach().numpy()
    else:
        normed = norm(torch.from_numpy(y)).detach().numpy()
    return normed @ model.lm_head.weight.detach().numpy().T
