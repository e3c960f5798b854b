"""The float64 reference against transformers, and what it says of engines that depart from it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from chain import Chain, build_chain
from tiny_models import VARIANTS, VOCAB_SIZE, make_checkpoint
from tolerances import BLOCK_FP32_RELATIVE, LOGITS_FP32

from ojfa_export import backends
from ojfa_export.bundle.weight_format import BLOCK_MATRICES
from ojfa_export.errors import CalibrationError, VerificationError
from ojfa_export.graphs.weights import references
from ojfa_export.shortcuts.hidden import collect_hidden_states
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.blocks import Subject, largest_tensor, make_subject, verify_blocks
from ojfa_export.verify.exact import HIDDEN, ExactModel
from ojfa_export.verify.outcome import raise_failed
from ojfa_export.verify.reference import TransformersReference

LENGTH = 24


def make(name, rng, tmp_path, **options) -> Chain:
    seed = int(rng.integers(2**31))
    checkpoint = make_checkpoint(name, tmp_path / "checkpoint", seed=seed)
    return build_chain(checkpoint, tmp_path, seed=seed, **options)


def tables(chain: Chain):
    rotary = chain.checkpoint.family.rotary(chain.checkpoint.config)
    return rotary.tables(chain.max_length) if rotary else None


def subject(chain: Chain, engines=None) -> Subject:
    return make_subject(
        chain.spec,
        chain.precision,
        chain.graphs,
        tables(chain),
        chain.shortcut,
        engines or chain.open_engines(),
        backends.load("onnxruntime"),
    )


def token_ids(rng, rows=2):
    return rng.integers(VOCAB_SIZE, size=(rows, LENGTH)).astype(np.int32)


def enlarge(chain: Chain, graph: str, weight: str, factor: float) -> None:
    model = onnx.load(chain.graphs / f"{graph}.onnx", load_external_data=False)
    ref = references(model)[weight]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(ref.dtype)
    values = np.memmap(chain.graphs / ref.location, dtype, "r+", ref.offset, ref.dims)
    values[:] = values * factor
    values.flush()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reference_is_the_model(name, rng, tmp_path, monkeypatch):
    """Block by block on transformers' own hidden states; only rounding to fp32 is between them."""
    monkeypatch.setattr("ojfa_export.verify.exact.TOGETHER", 2 * LENGTH)
    chain, ids = make(name, rng, tmp_path), token_ids(rng, rows=3)
    exact = ExactModel(chain.spec, chain.graphs, tables(chain))
    states: list[np.ndarray] = []
    reference = TransformersReference(chain.checkpoint.directory)
    logits = reference.forward(ids, lambda _, hidden: states.append(hidden.copy()))

    def assert_near(actual, expected):
        tolerance = BLOCK_FP32_RELATIVE * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)

    assert_near(exact.embed(ids), states[0])
    for index in range(chain.spec.blocks):
        hidden, weights = states[index].astype(np.float64), exact.block_weights(index)
        assert_near(exact.block(index, hidden)[HIDDEN], states[index + 1])
        given: dict[str, np.ndarray] = {}

        def matrix(name, x, weights=weights, given=given):
            given[name] = x
            return weights[f"{name}.weight"]

        exact.pass_on(index, weights, hidden, matrix)
        assert_near(hidden, states[index + 1])
        assert [f"{name}.weight" for name in given] == list(BLOCK_MATRICES)
    last = states[-1].reshape(-1, chain.spec.hidden_size).astype(np.float64)
    expected = logits.reshape(len(last), -1)
    actual = exact.logits(last, chain.spec.blocks)
    np.testing.assert_allclose(actual, expected, atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-gqa", {}),
        ("gpt2", {"kind": "residual"}),
        ("llama-gqa", {"kind": "mlp", "precision": "fp16"}),
        ("phi3-sliding-window", {"precision": "fp16"}),
        ("gpt2", {"precision": "bf16"}),
        ("phi3-longrope", {}),
    ],
)
def test_right_engines_pass(name, options, rng, tmp_path):
    chain = make(name, rng, tmp_path, **options)
    checks = verify_blocks(subject(chain), token_ids(rng), SILENT)
    assert [check.name for check in checks if not check.passed] == []
    names = [check.name for check in checks]
    assert names[0] == "float64 embed: hidden"
    assert names[-1] == "float64 full depth: logits"
    last = f"block_{chain.spec.blocks - 1:02d}"
    assert f"float64 {last}: hidden" in names
    assert {"float64 final_head: logits", "float64 exit_head after 1: logits"} <= set(names)
    ranges = [name for name in names if name.startswith("fp16 range")]
    exits = {1, chain.spec.blocks // 2, chain.spec.blocks - 1}
    heads = len(exits) if options.get("kind") == "mlp" else 0
    assert len(ranges) == (chain.spec.blocks + heads if chain.precision == "fp16" else 0)


def test_too_little_text_compares_nothing(rng, tmp_path):
    chain = make("llama", rng, tmp_path)
    assert verify_blocks(subject(chain), token_ids(rng)[:, :7], SILENT) == []


def test_the_first_block_that_departs_is_named(rng, tmp_path):
    chain = make("llama-gqa", rng, tmp_path)
    engines = chain.open_engines()
    engines.load_blocks(chain.spec.blocks)  # with the weights as they were
    engines.logits(np.zeros((1, chain.spec.hidden_size), np.float32), 1)
    engines.logits(np.zeros((1, chain.spec.hidden_size), np.float32), chain.spec.blocks)
    file = chain.graphs / "block_02.bin"
    file.write_bytes(file.read_bytes())  # another file than the one that is mapped
    enlarge(chain, "block_02", "mlp.down.weight", 1.01)
    checks = verify_blocks(subject(chain, engines), token_ids(rng), SILENT)
    failed = [check.name for check in checks if not check.passed]
    assert failed[0] == "float64 block_02: hidden"
    assert "float64 block_03: hidden" not in failed  # its input is the reference's
    with pytest.raises(VerificationError, match="the first: float64 block_02: hidden differs"):
        raise_failed(checks, "float64", "fp32", backends.load("onnxruntime"))


def test_a_tensor_inside_a_block_is_named_where_the_backend_shows_it(rng, tmp_path):
    chain, ids = make("llama-gqa", rng, tmp_path), token_ids(rng, 1)
    exact = ExactModel(chain.spec, chain.graphs, tables(chain))

    def trace(block, hidden):
        tensors = exact.block(block, hidden[None].astype(np.float64))
        wrong = 1.001 if block == 1 else 1
        return {
            "attention.qkv": tensors["attention.qkv"][0].astype(np.float32),
            "attention.mixed": wrong * tensors["attention.mixed"][0].astype(np.float32),
        }

    checks = verify_blocks(replace(subject(chain), trace=trace), ids, SILENT)
    failed = [check.name for check in checks if not check.passed]
    assert failed == ["float64 block_01: attention.mixed"]


def test_an_overflow_is_named_with_its_size(rng, tmp_path):
    chain = make("llama-gqa", rng, tmp_path, precision="fp16")
    enlarge(chain, "block_01", "mlp.norm.weight", 3000)
    checks = verify_blocks(subject(chain), token_ids(rng), SILENT)
    exact = ExactModel(chain.spec, chain.graphs, tables(chain))
    everything = backends.load("onnxruntime")
    without_bf16 = SimpleNamespace(precisions=("fp16", "fp32"))  # as onnxruntime-cuda
    for backend, advice in ((everything, "bf16 or fp32"), (without_bf16, "fp32")):
        with pytest.raises(VerificationError) as caught:
            raise_failed(checks, "float64", "fp16", backend)
        message = str(caught.value)
        assert message.startswith("fp16 overflows in block_01: mlp.inner reaches ")
        assert str(caught.value.hint).endswith(f"build with --precision {advice}")
    hidden = rng.normal(size=(1, 4, chain.spec.hidden_size))
    largest = largest_tensor(exact.block(1, hidden))
    assert largest.tensor == "mlp.inner"
    assert largest.value > 65504


def test_of_several_tensors_beyond_fp16_the_first_is_named():
    tensors = {
        "attention.qkv": np.full((1, 2, 3), 7e4),
        "mlp.inner": np.full((1, 2, 3), -9e9),
        HIDDEN: np.full((1, 2, 3), 1e20),
    }
    assert largest_tensor(tensors).tensor == "attention.qkv"
    tensors["attention.qkv"][:] = 1
    largest = largest_tensor(tensors)
    assert (largest.tensor, largest.value) == ("mlp.inner", 9e9)
    tensors["mlp.inner"][:] = 2
    assert largest_tensor(tensors).value == 2  # hidden states stay fp32


def test_calibration_names_what_overflows(rng, tmp_path):
    """Engines that give infinity where fp16 would, as a GPU's do."""
    chain = make("llama-gqa", rng, tmp_path, precision="fp16")
    enlarge(chain, "block_01", "mlp.norm.weight", 3000)

    class Overflowing:
        def __init__(self, executor):
            self._executor = executor

        def embed(self, *arguments):
            return self._executor.embed(*arguments)

        def run(self, *arguments, **named):
            hidden = np.array(self._executor.run(*arguments, **named))
            hidden[np.abs(hidden) > 65504] = np.inf
            return hidden

    class Backend:
        def open_engines(self, *_):
            engines = chain.open_engines()
            make_executor = engines.executor
            engines.executor = lambda *shape: Overflowing(make_executor(*shape))
            return engines

    def collect(backend):
        return collect_hidden_states(
            chain.spec, backend, chain.graphs, chain.engine_files, tables(chain),
            token_ids(rng), tmp_path, SILENT,
        )  # fmt: skip

    with pytest.raises(CalibrationError) as caught:
        collect(Backend())
    message = str(caught.value)
    assert message.startswith("fp16 overflows in block_01 on the calibration text: mlp.inner")
    assert message.endswith("fp16 holds 65504")
