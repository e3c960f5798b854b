"""Models with quantised weights on the TensorRT backend, on a stand-in for the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from chain import Chain, build_chain
from elements import split_precision
from quantised_checkpoints import float_rows, gptq_config, gptq_layer, write_checkpoint
from shortcut_kinds import split_kind
from stand_in.tensorrt import Builder
from tiny_models import VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_BF16_RELATIVE, LOGITS_FP16_RELATIVE

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.onnxruntime.dialect import OnnxRuntimeCpu
from ojfa_export.backends.quantised import check_runs
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.weight_format import WeightFormat, dequantise
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import plan
from ojfa_export.compiler.settings import decide
from ojfa_export.errors import BackendError, UsageError
from ojfa_export.models.float8 import E4M3
from ojfa_export.runtime.session import Session

LENGTH = 112
INT4 = WeightFormat(storage="int4", group_size=32, zero_points=True)


@dataclass
class Case:
    chain: Chain
    directory: Path

    def open(self) -> Engines:
        from ojfa_export.backends.tensorrt.backend import BACKEND

        return self.chain.open_on(BACKEND, self.directory)

    def close(self, actual, expected) -> None:
        relative = {"fp16": LOGITS_FP16_RELATIVE, "bf16": LOGITS_BF16_RELATIVE}
        bound = relative[self.chain.precision] * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=bound, rtol=0)


# A gated MLP, biases and LayerNorm; a head that the exits share, and rows of it that check them;
# blocks behind exits; numbers of a checkpoint with its own order of inputs, and a head that it
# hasn't quantised.
CASES = ["llama-gqa", "gpt2-bf16", "llama-gqa-residual", "llama-gqa-block", "gptq-act-order"]
CASES += ["fp8-bf16"]  # numbers of a checkpoint that are 8-bit floats


@pytest.fixture(scope="module", params=CASES)
def case(request, driver, tmp_path_factory) -> Case:
    directory, name = tmp_path_factory.mktemp(request.param), request.param
    if name == "gptq-act-order":
        layer = gptq_layer(np.random.default_rng(5), 4, 32, act_order=True)
        config = gptq_config(4, 32, desc_act=True)
        checkpoint, form = write_checkpoint("llama-gqa", directory / "c", layer, config), None
        kind, precision = "narrow", "fp16"
    elif name == "fp8-bf16":
        layer, config = float_rows(np.random.default_rng(5))
        checkpoint, form = write_checkpoint("llama-gqa", directory / "c", layer, config), None
        kind, precision = "narrow", "bf16"
    else:
        before, precision = split_precision(name)
        variant, kind = split_kind(before)
        checkpoint, form = make_checkpoint(variant, directory / "c", seed=5), INT4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeCpu, "accuracy_level", 1)  # products of nothing rounded
        chain = build_chain(
            checkpoint,
            directory,
            precision="bf16" if precision == "bf16" else "fp16",
            weights=form,
            max_length=LENGTH,
            kind=kind,
            float_groups=(32,),
            check_tokens=np.arange(3, VOCAB_SIZE, 7, dtype=np.int32)
            if kind == "residual"
            else None,
        )
    (directory / "built").mkdir()
    return Case(chain, directory / "built")


def test_no_engine_is_built(case):
    built = len(Builder.built)
    case.open()
    assert len(Builder.built) == built
    assert not list(case.directory.glob("*.engine"))


def test_steps_and_prompts_at_any_exit(case, rng):
    """Of one token to more than the kernels of a step take."""
    spec = case.chain.spec
    session, reference = Session(spec, case.open(), 2, LENGTH), case.chain.session(2, LENGTH)
    last = spec.blocks - 1
    for tokens, exit in ((1, 1), (2, last), (5, spec.blocks), (1, spec.blocks), (60, 1)):
        ids = rng.integers(VOCAB_SIZE, size=(2, tokens)).tolist()
        case.close(session.advance(ids, exit), reference.advance(ids, exit))
    case.close(session.advance([[1], [2]]), reference.advance([[1], [2]]))


@pytest.mark.parametrize("rows", [1, 2, 17, 60])
def test_heads_of_any_rows(case, rng, rows):
    hidden = rng.normal(size=(rows, case.chain.spec.hidden_size)).astype(np.float32)
    engines, chain = case.open(), case.chain
    for blocks_run in (1, chain.spec.blocks):
        expected = chain.engines.logits(hidden, blocks_run)
        case.close(engines.logits(hidden, blocks_run), expected)
        if chain.check_tokens is not None and blocks_run < chain.spec.blocks:
            found = engines.check_logits(hidden, blocks_run)
            case.close(found, expected[:, chain.check_tokens])


def test_kernels_by_the_number_of_tokens(case, driver):
    session = Session(case.chain.spec, case.open(), 1, LENGTH)
    for tokens, wanted in (
        (1, "norm_quantised_up"),
        (7, "quantised_batch_up_8"),
        (LENGTH - 8, "dequantise"),
    ):
        driver.launched.clear()
        session.advance([list(range(tokens))])
        assert wanted in driver.launched
    assert "tiled_up_8" not in driver.launched


def test_memory_is_counted_as_it_is_taken(case):
    from ojfa_export.backends.tensorrt.memory import Request, Room

    engines = case.open()
    names = ["embed", "block_00", "exit_head"]
    if isinstance(case.chain.shortcut, BlockShortcut):
        names[-1] = "final_head"
    arrays = [each for name in names for each in engines.weights(name).values()]
    held = {array.pointer: array.nbytes for array in (getattr(e, "array", e) for e in arrays)}
    room = Room(case.chain.spec, 2, 2, {name: engines.plan(name) for name in names})
    assert room.need(Request(range(1))).weights == sum(held.values())


def test_what_is_asked_of_engines_is_refused(case, monkeypatch):
    monkeypatch.setenv("OJFA_DECODE", "engines")
    storage = case.chain.weights.storage
    with pytest.raises(BackendError, match=f"{storage} has no engines of TensorRT") as refused:
        case.open()
    assert "without --weights" in str(refused.value.hint)


def test_what_the_backend_does_not_run(driver):
    from ojfa_export.backends.tensorrt.backend import BACKEND

    check_runs(BACKEND, INT4, "fp16")
    check_runs(BACKEND, None, "fp32")
    with pytest.raises(BackendError, match=r"int4 .* beside fp32, which the tensorrt") as caught:
        check_runs(BACKEND, INT4, "fp32")
    assert "--precision fp16 or bf16" in str(caught.value.hint)
    small = INT4.model_copy(update={"group_size": 16})
    with pytest.raises(BackendError, match=r"groups of 16 .*, whose groups the tensorrt") as caught:
        check_runs(BACKEND, small, "bf16")
    assert "groups of 32, 64, 128, 256" in str(caught.value.hint)
    fractional = INT4.model_copy(update={"offsets": True})
    with pytest.raises(BackendError, match="fractional zero points, which the tensorrt") as caught:
        check_runs(BACKEND, fractional, "fp16")
    assert "for this backend" in str(caught.value.hint)


def test_8_bit_floats_need_a_gpu_that_widens_them(driver, monkeypatch):
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.tensorrt.backend import BACKEND

    floats = WeightFormat(storage="fp8", group_size=128)
    check_runs(BACKEND, floats, "bf16")
    monkeypatch.setattr(the_device(), "compute_capability", (8, 6))
    said = r"weights are fp8 in groups of 128, which need a GPU of .* 8.9 or later; .* has 8.6$"
    with pytest.raises(BackendError, match=said) as caught:
        check_runs(BACKEND, floats, "bf16")
    assert "--weights int8" in str(caught.value.hint)
    check_runs(BACKEND, INT4, "bf16")
    assert BACKEND.lacks("int8") is None


@pytest.mark.parametrize(("features", "size"), [(4096, 128), (576, 64), (96, 32), (48, 128)])
def test_groups_are_as_large_as_a_gpu_would_have_them(case, driver, features, size):
    """The largest up to 128 that divides; where none does, what is refused with sizes that do."""
    from ojfa_export.backends.tensorrt.backend import BACKEND

    sizes = {"hidden_size": features, "intermediate_size": 3 * features}
    spec = case.chain.spec.model_copy(update={**sizes, "heads": 1, "head_dim": features})
    options = BuildOptions("checkpoint", Path("out"), weights="int4", precision="fp16", rank=8)
    if features % 32:
        with pytest.raises(UsageError, match="128 doesn't divide the model's 48 features"):
            decide(options, spec, None, None, BACKEND.group_sizes)
    else:
        decided = decide(options, spec, None, None, BACKEND.group_sizes)
        assert decided.group_size == size


def test_rounding_to_the_nearest(driver, rng):
    """No weight is off by more than half a step of its group."""
    from ojfa_export.backends.tensorrt.backend import BACKEND

    columns = rng.normal(size=(128, 40)).astype(np.float32)
    for storage in ("int4", "int8"):
        form = INT4.model_copy(update={"storage": storage})
        matrix = BACKEND.quantise(columns, form)
        steps = np.repeat(matrix.scales.T, 32, axis=0)
        assert np.abs(dequantise(matrix, form).T - columns).max() <= 0.501 * steps.max()
        assert (np.abs(dequantise(matrix, form).T - columns) <= 0.501 * steps).mean() > 0.99


@pytest.mark.parametrize(
    ("precision", "capability", "kept"),
    [("bf16", (8, 9), "fp8"), ("fp32", (9, 0), None), ("bf16", (8, 0), None)],
)
def test_8_bit_floats_of_a_checkpoint_are_kept_where_they_run(
    driver, monkeypatch, tmp_path, precision, capability, kept
):
    """Elsewhere they are what they stand for, in the precision of all else."""
    from ojfa_export.backends.cuda.device import the_device

    monkeypatch.setattr(the_device(), "compute_capability", capability)
    layer, config = float_rows(np.random.default_rng(5))
    checkpoint = write_checkpoint("llama-gqa", tmp_path, layer, config)
    options = BuildOptions(
        str(checkpoint), tmp_path / "out", backend="tensorrt", precision=precision
    )
    settings = plan(options)["settings"]
    assert settings["weights"] == kept
    assert settings["group_size"] == (32 if kept else None)


def test_rounding_to_8_bit_floats(driver, rng):
    """Each weight is the nearest of all numbers times its scale, and the largest is the largest."""
    from ojfa_export.backends.tensorrt.backend import BACKEND

    form = WeightFormat(storage="fp8", group_size=32)
    columns = rng.normal(size=(64, 9)).astype(np.float32) * np.exp(rng.normal(size=(1, 9)) * 4)
    columns[:32, 2] = 0
    matrix = BACKEND.quantise(columns.astype(np.float32), form)
    numbers = np.unique(E4M3[np.isfinite(E4M3)]).astype(np.float64)
    scales = np.repeat(matrix.scales, 32, axis=1).astype(np.float64)
    off = np.abs(numbers * scales[..., None] - columns.T[..., None].astype(np.float32))
    found = np.abs(dequantise(matrix, form, np.float64) - columns.T.astype(np.float32))
    np.testing.assert_allclose(found, off.min(axis=-1), atol=1e-7 * scales.max(), rtol=1e-4)
    largest = np.abs(dequantise(matrix, form)).reshape(9, 2, 32).max(axis=-1)
    np.testing.assert_allclose(largest, np.abs(columns.T).reshape(9, 2, 32).max(-1), rtol=1e-6)
