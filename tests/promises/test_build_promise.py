"""Promises asked of a build: kept in the bundle, or refused with what is missing."""

from __future__ import annotations

import inspect
import json
import pydoc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ojfa_export
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import MANIFEST, STATISTICS
from ojfa_export.bundle.promise import Limits, Promise
from ojfa_export.cli.app import app
from ojfa_export.compiler import exits, statistics_stage
from ojfa_export.compiler.decided import FULL_DEPTH
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build, plan
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BundleError, CalibrationError, UsageError
from ojfa_export.models.calibration_text import CalibrationText, read_source
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.certify import certify
from ojfa_export.promises.p_values import windows_needed
from ojfa_export.promises.statistics import load_statistics
from ojfa_export.promises.windows import planning_windows, promise_windows

# Of a model with four blocks, milliseconds.
COSTS = {
    "exits": [1.1, 2.1, 3.1, 4.4], "exit_head": 0.1, "final_head": 0.4, "final_row": 0.05,
    "decide": 0.02, "checks": {"top": 0.12, "margin": 0.13, "entropy": 0.14},
    "catch_up": 0.1, "waiting": 0.01,
}  # fmt: skip

LAST_STAGES = ["statistics", "certification", "exits", "verify"]

Options = Callable[..., BuildOptions]


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(inspect.getsource(pydoc), encoding="utf-8")
    return path


@pytest.fixture
def options(tiny_checkpoint: Path, calibration_text: Path, prose: Path, tmp_path: Path) -> Options:
    plain = BuildOptions(
        str(tiny_checkpoint),
        tmp_path / "out.ojfa",
        rank=8,
        shortcut="ojfa",
        calibration_data=(Path(f"code={calibration_text}"), Path(f"docs={prose}")),
        calibration_tokens=1024,
        max_cache_length=32,
        skip_verification=True,
        max_disagreement=0.3,
    )
    return lambda **changes: replace(plain, **changes)


def test_promise_in_the_bundle(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is cheapest depends on how fast this machine is; all else is the same in every build.
    costs = StepCosts.model_validate(COSTS)
    monkeypatch.setattr(statistics_stage, "measure_costs", lambda *_, **__: costs)
    monkeypatch.setattr(exits, "Turns", lambda *_: None)  # no rehearsal: it is timed as well
    result = build(options())
    manifest = Bundle(result.bundle).manifest
    assert manifest.promise is not None
    assert manifest.promise == result.promise
    assert manifest.auto == (manifest.promise.policy or FULL_DEPTH)
    assert manifest.promise.limits == Limits(max_disagreement=0.3)
    assert [domain.name for domain in manifest.promise.domains] == ["code", "docs"]
    splits = load_statistics(result.bundle / STATISTICS)
    for evidence, rows in zip(
        manifest.promise.domains, splits["certification"].members(), strict=True
    ):
        assert evidence.windows == len(rows) >= windows_needed(0.3, 0.95)
        assert evidence.disagreement <= 0.3
    assert [stage.name for stage in result.stages][-4:] == LAST_STAGES
    assert manifest.promise.reason in result.summary()
    assert result.to_json()["promise"]["limits"]["max_disagreement"] == 0.3

    again = build(options(output=result.bundle.with_name("again.ojfa")))
    assert again.decided == result.decided
    assert (again.bundle / STATISTICS).read_bytes() == (result.bundle / STATISTICS).read_bytes()

    said = CliRunner().invoke(app, ["inspect", str(result.bundle)])
    assert manifest.promise.reason in said.stdout


def test_full_depth_where_no_exit_keeps_the_promise(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_kept(*arguments: Any) -> Promise:
        return certify(*arguments).model_copy(update={"policy": None})

    monkeypatch.setattr(exits, "certify", nothing_kept)
    result = build(options())
    model = ojfa_export.load(result.bundle)
    assert model.manifest.auto == ExitPolicy(exits=(), measure="top", thresholds=())
    auto, full = (
        model.generate("def ", exit=exit, max_new_tokens=6).prompts[0] for exit in ("auto", "full")
    )
    assert auto.token_ids == full.token_ids
    assert set(auto.exit_blocks) == {model.blocks}


def test_thresholds_edited_by_hand(options: Options) -> None:
    result = build(options(max_disagreement=0.9))
    path = result.bundle / MANIFEST
    fields = json.loads(path.read_text())
    fields["auto"] = {"exits": [1], "measure": "top", "thresholds": [0.01]}
    path.write_text(json.dumps(fields))
    with pytest.raises(BundleError, match="was altered"):
        Bundle(result.bundle)


def test_too_little_text_says_how_much(options: Options) -> None:
    asked = options(max_disagreement=0.001)
    with pytest.raises(CalibrationError, match="domain 'code' has too little text") as caught:
        plan(asked)
    assert f"needs {-(-windows_needed(0.001, 0.95) * 4 // 3)}" in caught.value.message
    assert "bytes of it" in str(caught.value.hint)
    assert not list(asked.output.parent.glob("out.ojfa*"))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 7.0])
def test_promises_outside_their_range(options: Options, value: float) -> None:
    with pytest.raises(UsageError, match="max-disagreement must be between 0 and 1"):
        plan(options(max_disagreement=value))
    with pytest.raises(UsageError, match="confidence must be between 0 and 1"):
        plan(options(confidence=value))


def test_half_a_promise(options: Options) -> None:
    for name in ("confidence", "max_extra_surprisal"):
        with pytest.raises(UsageError, match=f"{name.replace('_', '-')} is part of a promise"):
            plan(options(max_disagreement=None, **{name: 0.9}))


def test_command_line(options: Options) -> None:
    asked = options()
    arguments = ["build", asked.checkpoint, "-o", str(asked.output), "--dry-run", "--json"]
    arguments += ["--max-cache-length", "32", "--rank", "8", "--calibration-tokens", "1024"]
    for source in asked.calibration_data:
        arguments += ["--calibration-data", str(source)]
    promise = ["--max-disagreement", "0.3", "--confidence", "0.9", "--max-extra-surprisal", "3"]
    done = CliRunner().invoke(app, [*arguments, *promise])
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["settings"]["limits"]["confidence"] == 0.9
    assert document["settings"]["limits"]["max_extra_surprisal"] == 3
    assert document["stages"][-4:] == LAST_STAGES
    assert CliRunner().invoke(app, [*arguments, "--max-disagreement", "1.5"]).exit_code == 2


def test_domains_of_sources(calibration_text: Path, tmp_path: Path) -> None:
    assert read_source(calibration_text).domain == "source"
    assert read_source(Path(f"code={calibration_text}")).domain == "code"
    odd = tmp_path / "a=b.txt"
    odd.write_text("a file whose name has the sign")
    assert read_source(odd).domain == "a=b"
    with pytest.raises(CalibrationError, match=r"calibration data .*none\.txt can't be read"):
        read_source(Path(f"code={tmp_path / 'none.txt'}"))


def test_windows_of_a_promise_never_meet() -> None:
    texts = [
        CalibrationText(name, ("x",), "0" * 64, 1000, domain)
        for name, domain in (("a", "code"), ("b", "docs"), ("c", "code"))
    ]
    rest = [np.arange(start, start + 400, dtype=np.int32)[:, None] for start in (0, 1000, 2000)]
    windows = promise_windows(texts, rest, Limits(max_disagreement=0.05))
    assert windows.domains == ("code", "docs")
    for tuning, certification, sources in zip(
        windows.tuning, windows.certification, ((0, 2), (1,)), strict=True
    ):
        together = np.concatenate([tuning, certification]).ravel()
        assert len(set(together.tolist())) == len(together)
        assert {int(value) // 1000 for value in together} == set(sources)
        assert len(tuning) == 64
        assert len(certification) == 256
        for source in sources:  # tuning comes before certification in each source
            last = max(v for v in tuning.ravel() if v // 1000 == source)
            assert last < min(v for v in certification.ravel() if v // 1000 == source)


def test_windows_to_plan_with() -> None:
    texts = [
        CalibrationText(name, ("x",), "0" * 64, 1000, domain)
        for name, domain in (("a", "code"), ("b", "docs"), ("c", "code"), ("d", "few"))
    ]
    rest = [np.arange(at, at + 100, dtype=np.int32)[:, None] for at in (0, 1000, 2000)]
    windows = planning_windows(texts, [*rest, np.arange(3000, 3003, dtype=np.int32)[:, None]])
    assert windows is not None
    assert windows.domains == ("code", "docs")  # three windows are too few to divide
    assert [len(each) for each in windows.tuning] == [8, 8]
    assert [len(each) for each in windows.certification] == [16, 16]
    for tuning, certification in zip(windows.tuning, windows.certification, strict=True):
        together = np.concatenate([tuning, certification]).ravel().tolist()
        assert len(set(together)) == len(together)
    assert planning_windows(texts[3:], [np.zeros((3, 1), np.int32)]) is None
    # Shorter than those of a promise, and less is asked of each.
    long = np.arange(100 * 512, dtype=np.int32).reshape(100, 512)
    windows = planning_windows(texts[:1], [long])
    assert windows is not None
    assert {each.shape[1] for each in (*windows.tuning, *windows.certification)} == {256}
    assert {int(row[0]) % 512 for row in windows.certification[0]} == {0}
    promised = promise_windows(texts[:1], [long], Limits(max_disagreement=0.3))
    assert promised.certification[0].shape[1] == 512
    assert windows.sampled < promised.sampled


def test_too_little_text_to_plan_with_is_no_error(
    options: Options, calibration_text: Path, tmp_path: Path
) -> None:
    text = tmp_path / "little.txt"
    text.write_text(calibration_text.read_text()[:4000])
    asked = options(calibration_data=(text,), max_disagreement=None, calibration_tokens=100_000)
    document = plan(asked)
    assert document["stages"] == ["export", "engines", "text", "calibrate", "verify"]
    result = build(asked)
    assert result.decided.default is None
    assert not (result.bundle / STATISTICS).exists()
