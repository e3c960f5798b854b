"""Verification passes on what is right, and names what is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from chain import build_chain, of_kind
from tiny_models import VOCAB_SIZE, make_checkpoint

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Golden
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.errors import BackendError, UsageError
from ojfa_export.graphs.weights import references
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import Silent
from ojfa_export.verify.checks import verify_against, verify_parts
from ojfa_export.verify.golden import verify_golden
from ojfa_export.verify.reference import TransformersReference
from ojfa_export.verify.tolerances import (
    BLOCK_ROUNDING,
    TOLERANCES,
    Comparisons,
    exit_allowance,
)


def make_chain(name, rng, tmp_path, **options):
    seed = int(rng.integers(2**31))
    checkpoint = make_checkpoint(name, tmp_path / "checkpoint", seed=seed)
    return build_chain(checkpoint, tmp_path, seed=seed, **options)


def verify(chain, rng, shape=(3, 24)):
    ids = rng.integers(VOCAB_SIZE, size=shape).astype(np.int32)
    reference = TransformersReference(chain.checkpoint.directory)
    return verify_parts(chain.parts(), reference, chain.checkpoint, ids, Silent())


def failed(checks):
    return {check.name for check in checks if not check.passed}


def perturb(chain, graph, weight, change):
    """Changes one number of a weight file."""
    model = onnx.load(chain.graphs / f"{graph}.onnx", load_external_data=False)
    ref = references(model)[weight]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(ref.dtype)
    values = np.memmap(chain.graphs / ref.location, dtype, "r+", ref.offset, ref.dims)
    values.flat[values.size // 2] = change(values.flat[values.size // 2])
    values.flush()


ALL_OF_GPT2 = {
    "graph embed",
    "engine embed",
    *(f"{what} block_{index:02d}" for what in ("graph", "engine") for index in range(3)),
    "graph final_head",
    "engine final_head",
    "graph exit_head",
    "engine exit_head",
    "logits full depth",
    "decode full depth",
    "logits exit 1",
    "logits exit 2",
}

AS_USERS = {
    *(f"tokenizer: {what}" for what in ("added tokens", "white space", "a long text", "Unicode")),
    *("tokenizer: text of tokens", "generation: defaults", "generate"),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_right_parts_pass(precision, rng, tmp_path):
    checks = verify(make_chain("gpt2", rng, tmp_path, precision=precision), rng)
    assert {check.name for check in checks} == ALL_OF_GPT2
    assert len(checks) == len(ALL_OF_GPT2)
    assert not failed(checks)
    assert all(0 <= check.max_abs_diff <= check.tolerance for check in checks)
    if precision == "fp32":
        logits = [check for check in checks if check.name.startswith(("logits", "decode"))]
        assert all(check.max_abs_diff <= 1e-4 for check in logits)


@pytest.mark.parametrize(("kind", "weight"), [("residual", "gates"), ("mlp", "exit.bias")])
@pytest.mark.parametrize(
    ("name", "precision"), [("gpt2", "fp32"), ("llama-gqa", "fp32"), ("phi3", "fp16")]
)
def test_right_jumps_pass_and_a_wrong_number_of_an_exit_does_not(
    name, precision, kind, weight, rng, tmp_path
):
    chain = make_chain(name, rng, tmp_path, precision=precision, kind=kind)
    checks = verify(chain, rng)
    assert not failed(checks)
    assert {"graph exit_head", "engine exit_head", "logits exit 2"} <= {c.name for c in checks}
    perturb(chain, "exit_head", weight, lambda value: value + 10)  # of exit 2, the later one
    assert failed(verify(chain, rng)) == {"graph exit_head", "engine exit_head", "logits exit 2"}


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-sliding-window"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 100), (5, 12)])
def test_any_window_passes(name, shape, rng, tmp_path):
    assert not failed(verify(make_chain(name, rng, tmp_path), rng, shape))


def test_both_lengths_of_longrope(rng, tmp_path):
    chain = make_chain("phi3-longrope", rng, tmp_path)
    checks = verify(chain, rng, (2, 60))
    assert not failed(checks)
    names = {check.name for check in checks}
    assert {"logits full depth", "logits full depth (long context)"} <= names
    assert {f"logits exit {blocks_run}" for blocks_run in (1, 2, 3)} <= names
    # Tokens for the short context alone leave the long one out.
    assert not any("long" in check.name for check in verify(chain, rng, (2, 38)))


def test_dynamic_rope_is_compared_within_the_trained_length(rng, tmp_path):
    assert not failed(verify(make_chain("llama-rope-dynamic", rng, tmp_path), rng, (2, 60)))


def test_wrong_weight_of_a_block_is_named(rng, tmp_path):
    chain = make_chain("llama", rng, tmp_path)
    perturb(chain, "block_02", "mlp.down.weight", lambda value: value + 0.1)
    # Exits 1 and 2 don't run the third block.
    assert failed(verify(chain, rng)) == {
        "graph block_02",
        "engine block_02",
        "logits full depth",
        "decode full depth",
        "logits exit 3",
    }


def test_wrong_weight_of_a_head_is_named(rng, tmp_path):
    chain = make_chain("gpt2-untied", rng, tmp_path)
    perturb(chain, "final_head", "head", lambda value: value + 0.1)
    assert failed(verify(chain, rng)) == {
        "graph final_head",
        "engine final_head",
        "logits full depth",
        "decode full depth",
    }
    perturb(chain, "final_head", "head", lambda value: value - 0.1)
    perturb(chain, "exit_head", "vocabulary", lambda value: value + 0.1)
    exits = {"logits exit 1", "logits exit 2"}
    assert failed(verify(chain, rng)) == {"graph exit_head", "engine exit_head", *exits}


def test_nan_fails(rng, tmp_path):
    chain = make_chain("gpt2", rng, tmp_path)
    perturb(chain, "block_00", "attention.norm.bias", lambda _: np.nan)
    checks = {check.name: check for check in verify(chain, rng)}
    for name in ("graph block_00", "engine block_00", "logits full depth", "logits exit 1"):
        assert not checks[name].passed
        assert checks[name].max_abs_diff == np.inf
        assert np.isfinite(checks[name].tolerance)
    assert checks["graph block_01"].passed


def test_engine_of_another_block_is_named(rng, tmp_path):
    """The portable graphs are right, the engine is not."""
    chain = make_chain("llama", rng, tmp_path)
    chain.engine_files["block_01"].write_bytes(chain.engine_files["block_02"].read_bytes())
    names = failed(verify(chain, rng))
    assert "engine block_01" in names
    assert not any(name.startswith("graph") for name in names)


def test_damaged_graph(rng, tmp_path):
    chain = make_chain("gpt2", rng, tmp_path)
    (chain.graphs / "block_01.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"block_01\.onnx"):
        verify(chain, rng)


def test_too_few_tokens(rng, tmp_path):
    with pytest.raises(UsageError, match="7 tokens"):
        verify(make_chain("gpt2", rng, tmp_path), rng, (2, 7))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-rope-theta", "phi3"])
def test_narrow_shortcuts_pass(name, rng, tmp_path):
    """With rank 1 the norm enlarges rounding wherever the jump's one number is near 0."""
    assert not failed(verify(make_chain(name, rng, tmp_path, rank=1), rng, (4, 32)))


@pytest.mark.parametrize("kind", ["narrow", "mlp"])
def test_exit_allowance_is_what_noise_does(kind, rng, tmp_path):
    """Against a sample of noisy hidden states, and small where the jump is well-conditioned."""
    size, vocabulary, count = 48, 40, 200
    spec = Checkpoint(make_checkpoint("gpt2", tmp_path, seed=0)).spec
    spec = spec.model_copy(update={"blocks": 10, "hidden_size": size})
    shortcut = of_kind(kind, spec, 2, int(rng.integers(2**31)))
    norm = FinalNorm("layer", np.ones(size), None, 1e-12)
    head = LanguageHead(norm, rng.normal(size=(vocabulary, size)), None)
    hidden = rng.normal(size=(count, size)) * rng.uniform(0.1, 10, size=(count, 1))
    logits = head.logits(shortcut.apply(hidden, 9))
    allowance = exit_allowance(shortcut, norm, hidden, logits, "fp32", 9)
    deviation = 3 * BLOCK_ROUNDING["fp32"] * np.sqrt(np.mean(hidden**2, axis=1, keepdims=True))
    noisy = [hidden + deviation * rng.normal(size=hidden.shape) for _ in range(20)]
    moved = np.stack(
        [np.abs(head.logits(shortcut.apply(h, 9)) - logits).max(axis=1) for h in noisy]
    )
    # The direction of the noise decides how much of it the norm takes away: less than allowed,
    # but not by much.
    typical = np.sqrt(np.mean(moved**2, axis=0)) / allowance
    assert 0.1 < np.median(typical) < 1.2
    assert np.quantile(typical, 0.95) < 2


def test_allowance_is_by_row():
    comparisons = Comparisons("fp32")
    expected = np.zeros((2, 3))
    actual = np.array([[0, 0, 5e-4], [0, 2e-4, 0]])
    comparisons.record("near", "logits", actual, expected, np.array([1e-3, 3e-4]))
    comparisons.record("far", "logits", actual, expected, np.array([1e-3, 0]))
    near, far = comparisons.checks()
    assert near.passed
    assert not far.passed
    assert (far.max_abs_diff, far.tolerance) == (2e-4, 1e-4)


def test_comparisons_keep_the_largest(rng):
    comparisons = Comparisons("fp32")
    expected = rng.normal(size=(4, 5))
    comparisons.record("a", "logits", expected + 3e-5, expected)
    comparisons.record("a", "logits", expected - 7e-5, expected)
    comparisons.record("a", "logits", expected, expected)
    comparisons.record("b", "hidden", expected * (1 + 2e-5), expected)
    first, second = comparisons.checks()
    assert first.max_abs_diff == pytest.approx(7e-5)
    assert first.tolerance == 1e-4
    assert first.passed
    assert second.tolerance == TOLERANCES["fp32"]["hidden"].relative * np.abs(expected).max()
    assert not second.passed
    with pytest.raises(ValueError, match="shape"):
        comparisons.record("a", "logits", expected[:1], expected)


def test_logits_beyond_fp32_resolution_have_a_relative_bound():
    bound = TOLERANCES["fp32"]["logits"].bound
    assert bound(20) == bound(1) == 1e-4
    assert bound(200) == pytest.approx(1e-3)


def test_bundle(rng, tmp_path):
    """A bundle as it is built, and against the checkpoint of another model."""
    checkpoint = make_checkpoint("gpt2", tmp_path / "checkpoint", seed=int(rng.integers(2**31)))
    options = BuildOptions(
        str(checkpoint), tmp_path / "bundle", calibration_tokens=3000, skip_verification=True
    )
    bundle = Bundle(build(options).bundle)
    model = Model(bundle)
    # More sequences and tokens than the bundle holds: 16 of 128.
    ids = rng.integers(VOCAB_SIZE, size=(17, 140)).astype(np.int32)
    checks = verify_against(bundle, model, checkpoint, ids, Silent())
    assert {check.name for check in checks} == ALL_OF_GPT2 | AS_USERS
    assert not failed(checks)
    assert model.manifest.golden
    assert not failed(verify_golden(model))
    other = make_checkpoint("gpt2-relu", tmp_path / "other", seed=0)
    with pytest.raises(UsageError, match="another model"):
        verify_against(bundle, model, other, ids, Silent())


def greedy(chain, prompt, exit, count):
    session, pending, tokens = chain.session(), prompt, []
    for _ in range(count):
        pending = [int(session.advance(pending, exit)[0].argmax())]
        tokens += pending
    return tuple(tokens)


def test_golden_tokens(rng, tmp_path):
    chain = make_chain("llama", rng, tmp_path, max_length=16)
    prompt = rng.integers(VOCAB_SIZE, size=8).tolist()
    golden = [
        Golden(exit=exit, prompt_token_ids=prompt, token_ids=greedy(chain, prompt, exit, 8))
        for exit in (4, 2)
    ]
    model = SimpleNamespace(
        manifest=SimpleNamespace(golden=golden, check=None), blocks=4, session=chain.session
    )
    checks = verify_golden(model)
    assert [check.name for check in checks] == ["golden tokens full depth", "golden tokens exit 2"]
    assert all(check.passed and check.max_abs_diff == check.tolerance == 0 for check in checks)
    last = (golden[1].token_ids[-1] + 1) % VOCAB_SIZE
    golden[1] = golden[1].model_copy(update={"token_ids": (*golden[1].token_ids[:-1], last)})
    checks = verify_golden(model)
    assert [check.passed for check in checks] == [True, False]
    assert checks[1].max_abs_diff == 1


def test_golden_tokens_of_a_model_with_nan(rng, tmp_path):
    chain = make_chain("gpt2", rng, tmp_path)
    golden = Golden(exit=3, prompt_token_ids=(1, 2), token_ids=(3, 4))
    perturb(chain, "block_01", "mlp.norm.bias", lambda _: np.nan)
    model = SimpleNamespace(
        manifest=SimpleNamespace(golden=[golden], check=None), blocks=3, session=chain.session
    )
    (check,) = verify_golden(model)
    assert not check.passed
    assert check.max_abs_diff == np.inf
