"""Builds with quantised weights: whole, verified, and what they can't be."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attack.digests import edit_manifest, redigest
from click.testing import CliRunner
from quantised_checkpoints import make_q4_1
from tiny_models import make_checkpoint
from tolerances import LOGITS_INT8_RELATIVE, QUANTISED_CORRELATION

from ojfa_export import backends
from ojfa_export.backends.quantised import check_runs
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.cli.app import app
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.errors import BackendError, BundleError, UsageError
from ojfa_export.graphs.weights import references
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.change import Change

Options = Callable[..., BuildOptions]
DEMO = Path(__file__).resolve().parents[2] / "calibration" / "demo" / "checkpoint"


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module", params=["int4", "int4 of Q4_1", "int8"])
def original(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """What weights are to be, and of which checkpoint: the tiny one, or one like it on a grid."""
    storage, _, was = request.param.partition(" of ")
    if not was:
        return storage, tiny_checkpoint
    return storage, make_q4_1(tmp_path_factory.mktemp("q4_1") / "checkpoint", 32, seed=11)


@pytest.fixture(scope="module")
def built(
    original: tuple[str, Path], calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of the checkpoint, verified; its exit head's matrix is quantised too."""
    storage, checkpoint = original
    options = BuildOptions(
        str(checkpoint),
        tmp_path_factory.mktemp(storage) / "out.ojfa",
        weights=storage,
        rank=32,
        shortcut="ojfa",
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=64,
    )
    result = build(options)
    assert "\nweights: " in result.summary()
    assert all(check.passed for check in result.report.checks)
    return result.bundle


def test_the_bundle_says_it_all(
    built: Path, original: tuple[str, Path], tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    form = Bundle(built).manifest.weights
    assert form is not None
    fields = json.loads((built / "manifest.json").read_text())
    storage, checkpoint = original
    fractional = {} if checkpoint == tiny_checkpoint else {"offsets": True}
    expected = {"storage": storage, "group_size": 32, "zero_points": True, **fractional}
    assert fields["weights"] == expected
    shown = " ".join(run("inspect", built).stdout.split())
    assert f"weights {form}: the blocks' attention.qkv" in shown
    assert "kept wider fp32: embeddings; norms, biases and the shortcut" in shown
    sizes = json.loads(run("inspect", built, "--json").stdout)["sizes"]
    wide = json.loads(run("inspect", tiny_bundle, "--json").stdout)["sizes"]
    assert "quantised" not in wide
    assert 0 < sizes["quantised"] < sizes["weights"] < wide["weights"]
    report = json.loads((built / "report" / "report.json").read_text())
    change = Change.model_validate(report["change"])
    assert str(change) in html.unescape((built / "report" / "report.html").read_text())
    assert change.agreement > 0.2  # random weights find many tokens about as likely


def test_others_are_as_they_were(tiny_bundle: Path) -> None:
    assert "weights" not in json.loads((tiny_bundle / "manifest.json").read_text())
    text = (tiny_bundle / "report" / "report.json").read_text()
    assert not {"weights", "change"} & set(json.loads(text))
    assert CalibrationReport.model_validate_json(text).change is None


def test_verify_says_what_it_changed(built: Path, original: tuple[str, Path]) -> None:
    document = json.loads(run("verify", built, "--against", original[1], "--json").stdout)
    assert document["passed"]
    change = Change.model_validate(document["change"])
    assert 0 < change.mean_kl < 1
    names = {check["name"] for check in document["checks"]}
    assert {"quantised block_00: steps", "quantised final_head: steps"} <= names
    assert "change" not in json.loads(run("verify", built, "--json").stdout)


def test_another_number_is_seen(built: Path, original: tuple[str, Path], tmp_path: Path) -> None:
    """A weight that is another step is not the checkpoint's, though everything else agrees.

    Of fitted ones no single weight says so: outputs that have one another's numbers.
    """
    copy = Path(shutil.copytree(built, tmp_path / "copy.ojfa"))
    graph = onnx.load(copy / "graphs" / "block_02.onnx", load_external_data=False)
    ref = references(graph)["mlp.down.weight.packed"]
    file = copy / "graphs" / ref.location
    data = bytearray(file.read_bytes())
    if original[0] == "int8":
        data[ref.offset + 7] ^= 2
    else:
        name = "mlp.down.weight.packed"
        [dims] = (each.dims for each in graph.graph.initializer if each.name == name)
        size = math.prod(dims[1:])
        numbers = np.frombuffer(data, np.uint8, dims[0] * size, ref.offset).reshape(-1, size)
        numbers[...] = np.roll(numbers, 1, axis=0)
    file.write_bytes(data)
    redigest(copy)
    arguments = ["verify", str(copy), "--against", str(original[1])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert "quantised block_02: steps" in result.stdout


def test_generates_like_the_original(built: Path, tiny_bundle: Path, rng) -> None:
    """Logits of quantised weights are near those of the weights that they were."""
    quantised, wide = Model(Bundle(built)), Model(Bundle(tiny_bundle))
    ids = rng.integers(300, size=20).tolist()
    [ours] = quantised.session(1).advance(ids, every_position=True)
    [theirs] = wide.session(1).advance(ids, every_position=True)
    storage = Bundle(built).manifest.weights.storage
    alike = np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]
    assert alike > QUANTISED_CORRELATION[storage]
    again = quantised.session(2)
    for at in range(0, 20, 5):
        logits = again.advance([ids[at : at + 5], ids[:2]])
    close = LOGITS_INT8_RELATIVE * np.abs(ours).max()
    np.testing.assert_allclose(logits[0], ours[-1], atol=close, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int2"}, "weights 'int2' is not known"),
        ({"weights": "int4", "group_size": 24}, "group-size 24 can't be"),
        ({"weights": "int4", "group_size": 8}, "group-size 8 can't be"),
        ({"weights": "int4", "group_size": 512}, "group-size 512 can't be"),
        ({"weights": "int4", "group_size": 64}, "group-size 64 doesn't divide .* 96 features"),
        ({"group_size": 32}, "group-size 32 is of quantised weights, but none are asked for"),
    ],
)
def test_what_cannot_be(options: Options, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        plan(options(**changes))
    assert caught.value.hint


def test_group_sizes_that_divide_are_named(options: Options) -> None:
    with pytest.raises(UsageError) as caught:
        plan(options(weights="int4", group_size=128))
    assert caught.value.hint == "sizes that do: 16, 32, 64"
    assert plan(options(weights="int4", group_size=16))["settings"]["group_size"] == 16


def test_a_model_of_no_whole_groups(options: Options, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "odd", seed=1)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    with pytest.raises(UsageError, match="32 doesn't divide the model's 100 features") as caught:
        plan(options(checkpoint=str(checkpoint), weights="int4"))
    assert caught.value.hint == "this model's weights can't be quantised"


class OtherBackend:
    """A backend that runs no quantised weights."""

    name = "onnxruntime-cuda"


def test_other_backends_refuse_it(
    options: Options, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = WeightFormat(storage="int4", group_size=32, zero_points=True)
    check_runs(backends.load("onnxruntime"), form, "fp32")
    said = "in groups of 32 with .*zero points, which the onnxruntime-cuda backend doesn't run"
    monkeypatch.setattr(backends, "load", lambda _: OtherBackend())
    for refused in (
        lambda: plan(options(weights="int4", backend="onnxruntime-cuda")),
        lambda: add_engines(built, "onnxruntime-cuda", SILENT),
        lambda: Model(Bundle(built), "onnxruntime-cuda"),
    ):
        with pytest.raises(BackendError, match=said) as caught:
            refused()
        assert "onnxruntime" in str(caught.value.hint)


def test_floats_are_not_for_the_cpu(options: Options) -> None:
    said = "weights are fp8 in groups of 32, which the onnxruntime backend doesn't run"
    with pytest.raises(BackendError, match=said) as caught:
        plan(options(weights="fp8"))
    assert "--weights int8" in str(caught.value.hint)


def test_what_goes_beside_them_is_the_backend_s_to_say(options: Options) -> None:
    said = r"int8 .* beside fp16, which the onnxruntime backend"
    with pytest.raises(BackendError, match=said) as caught:
        plan(options(weights="int8", precision="fp16"))
    assert "--precision fp32" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 16}, "contradicts manifest.json"),
        ({"storage": "int2"}, "weights.storage"),
        ({"group_size": 48}, "groups of 48 quantised weights can't be"),
        ({"group_size": 64}, "96 features are no whole groups"),
        ({"offsets": False, "zero_points": False}, "contradicts manifest.json"),
        ({"storage": "int4", "offsets": True, "group_size": 16}, "contradicts manifest.json"),
        ({"offsets": True, "zero_points": False}, "offsets are fractions of zero points of four"),
        (
            {"storage": "fp16", "group_size": 1, "zero_points": False, "offsets": False},
            "they must be quantised",
        ),
        ({"storage": "fp32"}, "fp32 weights have no groups"),
        ({"storage": "fp8"}, "fp8 weights have no zero points"),
        (None, "contradicts manifest.json"),
    ],
)
def test_a_manifest_that_says_otherwise(
    built: Path, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy.ojfa"))

    def edit(fields: dict[str, Any]) -> None:
        if change is None:
            del fields["weights"]
        else:
            fields["weights"].update(change)

    edit_manifest(copy, edit)
    with pytest.raises(BundleError, match=message):
        Bundle(copy)


def test_the_demo_from_checkpoint_to_verified_bundle(
    tmp_path: Path, calibration_text: Path
) -> None:
    bundle = tmp_path / "demo.ojfa"
    result = run(
        "build", DEMO, "-o", bundle, "--weights", "int4", "--shortcut", "ojfa", "--rank", "32",
        "--calibration-data", calibration_text, "--calibration-tokens", "2048",
        "--max-cache-length", "256",
    )  # fmt: skip
    assert "checks passed" in result.stdout
    assert "weights: int4 in groups of 32 with zero points; perplexity " in result.stdout
    report = json.loads((bundle / "report" / "report.json").read_text())
    change = Change.model_validate(report["change"])
    # On the text that ships: 15.08 against 14.73, and 89% of the tokens.
    assert change.perplexity < 1.06 * change.original_perplexity
    assert change.agreement > 0.85
