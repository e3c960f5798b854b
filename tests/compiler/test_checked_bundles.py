"""A bundle with a check head: built, certified on its confidence, verified, refused elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from stand_in import stand_in_gpu
from stand_in.onnxruntime_cuda import make_onnxruntime

import ojfa_export
from ojfa_export import backends
from ojfa_export.backends.checks import check_runs_checks
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Manifest, manifest_digest
from ojfa_export.bundle.names import CHECK_HEAD, MANIFEST, STATISTICS
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.cli.app import app
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.check_stage import DEFAULT_TOKENS, default_size, frequent
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BackendError, BundleError, UsageError
from ojfa_export.graphs.weights import map_tensors, references
from ojfa_export.planning.step_costs import measure_costs
from ojfa_export.promises.collect import collect_statistics
from ojfa_export.promises.measures import MEASURES
from ojfa_export.promises.outcomes import Costs, apply
from ojfa_export.promises.path import paths
from ojfa_export.promises.statistics import load_statistics
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.golden import verify_golden
from ojfa_export.verify.verify import verify_bundle

Options = Callable[..., BuildOptions]
SIZE = 50
# Of a model of four blocks.
COSTS = Costs.even(4, 1.0, 0.1, 1.0)


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    options = BuildOptions(
        str(tiny_checkpoint),
        tmp_path_factory.mktemp("checked") / "checked.ojfa",
        rank=8,
        shortcut="residual",
        check_vocabulary=SIZE,
        max_disagreement=0.5,
        confidence=0.8,
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=64,
    )
    result = build(options)
    assert {"graph check_head", "engine check_head"} <= {each.name for each in result.report.checks}
    assert "checks: 50 of 320 tokens" in result.summary()
    return result.bundle


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return ojfa_export.load(bundle)


def test_what_the_bundle_says_of_it(bundle: Path, model: Model) -> None:
    check = model.manifest.check
    assert check is not None
    assert check.size == SIZE
    assert [graph.name for graph in check.graphs] == [CHECK_HEAD]
    assert [each.backend for each in check.engines] == ["onnxruntime"]
    report = json.loads((bundle / "report" / "report.json").read_text())
    page = (bundle / "report" / "report.html").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    for said in (report["check"], page, " ".join(shown.stdout.split())):
        assert check.reason in said
    assert "as asked" in check.reason
    assert "check_head" in shown.stdout


def test_its_rows_are_those_of_the_whole_head(bundle: Path) -> None:
    opened = Bundle(bundle)
    tokens = opened.check_tokens()
    assert tokens is not None
    assert set(opened.manifest.model.spec.eos_token_ids) <= set(tokens.tolist())
    graphs = [
        onnx.load(opened.graphs / f"{name}.onnx", load_external_data=False)
        for name in ("exit_head", CHECK_HEAD)
    ]
    whole, check = (map_tensors(graph, opened.graphs) for graph in graphs)
    np.testing.assert_array_equal(check["head"], whole["head"][tokens])
    shared, own = (references(graph) for graph in graphs)
    assert {name for name in own if own[name] != shared[name]} == {"head"}


def test_frequent_tokens_and_those_that_end_a_text() -> None:
    counts = np.array([3, 0, 5, 1, 1, 0, 4], np.float64)
    assert frequent(counts, (), 3).tolist() == [0, 2, 6]
    assert frequent(counts, (5,), 3).tolist() == [2, 5, 6]
    assert frequent(counts, (), 4).tolist() == [0, 2, 3, 6]  # the lower id of equals


def test_statistics_and_certified_policies_are_of_its_confidence(
    bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """What certification counts on a text is what sessions then do there, token by token."""
    opened, backend = Bundle(bundle), backends.load("onnxruntime")
    spec, tables = opened.manifest.model.spec, opened.manifest.rotary
    assert tables is not None
    rotary = opened.tensor(tables.cos), opened.tensor(tables.sin)
    windows = rng.integers(spec.vocab_size, size=(4, 12)).astype(np.int32)

    def open_engines() -> Any:
        files = opened.engine_files("onnxruntime")
        return backend.open_engines(spec, opened.graphs, files, rotary)

    found = collect_statistics(
        spec, open_engines, ["d"], [windows], tmp_path, SILENT, np.random.default_rng(0)
    )
    path = paths(found)[MEASURES.index("margin")].only((1, 3))
    every = [path.policy(step) for step in range(len(path.thresholds))]
    policies = [policy for policy in every if policy is not None]
    outcomes = [apply(found, policy, COSTS, 10.0) for policy in policies]
    depths = np.array([outcome.depth.mean() for outcome in outcomes])
    middle = int(np.argmin(np.abs(depths - 2.5)))  # some leave, others don't
    model, counted = Model(opened), outcomes[middle]
    for window, differs, depth in zip(windows, counted.disagreement, counted.depth, strict=True):
        session, ran, wrong = model.session(), [], 0
        [full] = model.session().advance(window.tolist(), every_position=True)
        for token, logits in zip(window.tolist(), full, strict=True):
            choice = session.choose([token], policies[middle])
            ran += choice.blocks_run
            wrong += choice.tokens[0] != logits.argmax()
        assert np.mean(ran) == pytest.approx(depth)
        assert wrong / len(window) == pytest.approx(differs)


def test_a_token_that_leaves_pays_the_whole_head(bundle: Path, model: Model) -> None:
    tuning = load_statistics(bundle / STATISTICS)["tuning"]
    middle = float(np.median(tuning.of("top")[..., 1]))
    policy = ExitPolicy(exits=(2,), measure="top", thresholds=(middle,))
    free, paid = (
        apply(tuning, policy, each, surprisal_clip=10.0).cost.mean()
        for each in (COSTS, replace(COSTS, leaving=0.5))
    )
    leave = (tuning.of("top")[..., 1] >= middle).mean()
    assert paid - free == pytest.approx(0.5 * leave)
    measured = measure_costs(model.spec, model.engines, 64, rounds=1, seconds=0.0, progress=SILENT)
    assert measured.leaving == measured.exit_head == measured.of_policies().leaving


def test_verification_names_a_damaged_check_head(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ojfa"
    shutil.copytree(bundle, copy)
    weights = copy / "graphs" / f"{CHECK_HEAD}.bin"
    numbers = np.fromfile(weights, np.float32)
    numbers[: SIZE * 64] += 1
    numbers.tofile(weights)
    _say_again(copy)
    failed = {
        each.name for each in verify_bundle(copy, None, "onnxruntime", SILENT) if not each.passed
    }
    # A shift of all logits leaves every confidence as it was; each number of a row is another.
    assert {f"float64 check_head after {exit}: logits" for exit in (1, 2, 3)} <= failed
    assert not any(name.startswith("float64 exit_head") for name in failed)


def _say_again(bundle: Path, **changes: Any) -> None:
    """Writes a manifest that says what is there."""
    from ojfa_export.compiler.describe import describe_files

    raw = json.loads((bundle / MANIFEST).read_text())
    raw.pop("digest")
    raw["files"] = {name: each.model_dump() for name, each in describe_files(bundle).items()}
    raw.update(changes)
    (bundle / MANIFEST).write_text(json.dumps({**raw, "digest": manifest_digest(raw)}))


def test_golden_tokens_of_a_policy(model: Model) -> None:
    check = model.manifest.check
    assert check is not None
    golden = check.golden
    if golden is None:  # a random model may decide nothing clearly
        pytest.skip("no token of this model leads clearly")
    assert set(golden.blocks_run) == {2, 4}
    assert all(each.passed for each in verify_golden(model))
    other = golden.model_copy(update={"blocks_run": tuple(6 - each for each in golden.blocks_run)})
    manifest = model.manifest.model_copy(
        update={"check": check.model_copy(update={"golden": other})}
    )
    model.bundle.manifest, kept = manifest, model.bundle.manifest
    try:
        failed = [each for each in verify_golden(model) if not each.passed]
    finally:
        model.bundle.manifest = kept
    assert [each.name for each in failed] == ["golden tokens of a policy"]
    assert failed[0].max_abs_diff == len(golden.token_ids)


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime-cuda"])
def test_engines_for_a_gpu(
    name: str, model: Model, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins: a policy gives the tokens of the CPU, from its depths."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy, golden = shutil.copytree(bundle, tmp_path / "device.ojfa"), model.manifest.check.golden
    prompts, way = [[5, 6, 7], list(golden.prompt_token_ids)], {"exit": golden.policy}
    with stand_in_gpu() as driver:
        from ojfa_export.backends.onnxruntime_cuda import provider

        monkeypatch.setattr(provider, "ort", make_onnxruntime(driver))
        add_engines(copy, name, SILENT)
        checks = verify_bundle(copy, None, name, SILENT)
        assert all(each.passed for each in checks)
        assert {"float64 check_head after 1: logits", "golden tokens of a policy"} <= {
            each.name for each in checks
        }
        device = ojfa_export.load(copy, backend=name)
        found, wanted = (
            each.generate(prompts, **way, max_new_tokens=20, ignore_eos=True).prompts
            for each in (device, model)
        )
        for one, other in zip(found, wanted, strict=True):
            assert one.token_ids == other.token_ids
            assert one.exit_blocks == other.exit_blocks
        assert len({depth for each in found for depth in each.exit_blocks}) > 1
        del device


def test_a_backend_that_does_not_run_it() -> None:
    other: Any = SimpleNamespace(name="other")
    check_runs_checks(other, None)
    message = "a head of 50 tokens, which the other backend doesn't run"
    with pytest.raises(BackendError, match=message) as caught:
        check_runs_checks(other, 50)
    assert "--check-vocabulary 0" in str(caught.value.hint)


def test_engines_are_built_again(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "again.ojfa"
    shutil.copytree(bundle, copy)
    add_engines(copy, "onnxruntime", SILENT)
    kept, again = (json.loads((each / MANIFEST).read_text()) for each in (bundle, copy))
    assert again["check"] == kept["check"]
    assert all(each.passed for each in verify_golden(ojfa_export.load(copy)))


@pytest.mark.parametrize("size", [321, 10**9])
def test_more_tokens_than_the_model_has(size: int, options: Options) -> None:
    with pytest.raises(UsageError, match=f"check-vocabulary {size} is more than the model's 320"):
        plan(options(check_vocabulary=size))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (-1, "check-vocabulary must be 0 or more, not -1"),
        (1, "one token says nothing"),
        ("many", "check-vocabulary must be"),
        (2.5, "check-vocabulary must be"),
    ],
)
def test_sizes_that_make_no_sense(size: Any, message: str, options: Options) -> None:
    with pytest.raises(UsageError, match=message):
        options(check_vocabulary=size)


def test_the_command_line(tmp_path: Path, tiny_checkpoint: Path) -> None:
    asked = ["build", str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--dry-run", "--rank", "8"]
    refused = CliRunner().invoke(app, [*asked, "--check-vocabulary", "-3"])
    assert refused.exit_code
    assert "check-vocabulary must be 0 or more, not -3" in refused.output


def test_the_default_is_where_a_check_is_a_large_part_of_a_token(model: Model) -> None:
    # SmolLM2-135M: 28 M weights of the head among 134 M.
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "heads": 9, "kv_heads": 3}
    spec = model.spec.model_copy(
        update={**sizes, "head_dim": 64, "blocks": 30, "vocab_size": 49_152, "gated": True}
    )
    entry = model.manifest.shortcut
    count, reason = default_size(spec, entry, None)
    assert count == DEFAULT_TOKENS
    assert "would read 21% of what a token of full depth does" in reason
    narrow = entry.model_copy(update={"residual": False, "kind": "ojfa", "gates": None})
    assert default_size(spec, narrow, None)[0] == 0  # rank 8: a check is cheap already
    assert default_size(spec.with_vocabulary(4096), entry, None)[0] == 0
    wide = {"hidden_size": 4096, "intermediate_size": 11_008, "heads": 32, "kv_heads": 32}
    larger = spec.model_copy(update={**wide, "head_dim": 128, "vocab_size": 32_000})
    assert default_size(larger, entry, None)[0] == 0  # 2% of Llama-2-7B's
    form = WeightFormat(storage="int8", group_size=32, zero_points=True)
    assert default_size(spec, entry, form)[0] == DEFAULT_TOKENS


def test_no_check_head_where_none_is_asked_for(tiny_bundle: Path, options: Options) -> None:
    """The vocabulary is too small to be worth it; bundles are as they were."""
    assert "check" not in json.loads((tiny_bundle / MANIFEST).read_text())
    assert "check" not in plan(options(max_disagreement=0.3, confidence=0.8))["stages"]
    assert "check" in plan(options(check_vocabulary=SIZE))["stages"]
    assert "check" not in plan(options(check_vocabulary=0))["stages"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": []}, "has no check head for backend 'onnxruntime'"),
        ({"graphs": []}, "names graphs other than those"),
        ({"tokens": {"file": "graphs/none.bin", "offset": 0, "shape": [SIZE]}}, "without its"),
    ],
)
def test_a_manifest_that_lies_of_it(
    change: dict[str, Any], message: str, bundle: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "lies.ojfa"
    shutil.copytree(bundle, copy)
    check = json.loads((copy / MANIFEST).read_text())["check"]
    _say_again(copy, check={**check, **change})
    with pytest.raises(BundleError, match=message):
        ojfa_export.load(copy)


def test_sizes_that_contradict_the_graph(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lies.ojfa"
    shutil.copytree(bundle, copy)
    check = json.loads((copy / MANIFEST).read_text())["check"]
    check["tokens"]["shape"] = [SIZE - 1]
    _say_again(copy, check=check)
    with pytest.raises(BundleError, match=r"'logits' is float \[rows, 50\]"):
        ojfa_export.load(copy)
    raw = json.loads((bundle / MANIFEST).read_text())
    raw.pop("digest")
    raw["check"]["tokens"]["shape"] = [321]
    with pytest.raises(ValueError, match="some of the model's"):
        Manifest.model_validate_json(json.dumps(raw))
