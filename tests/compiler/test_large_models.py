"""What a build leaves out: what takes too much memory, and what changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ojfa_export
from ojfa_export.cli.app import app
from ojfa_export.compiler import decided, exits, statistics_stage
from ojfa_export.compiler.pipeline import build
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.statistics import ExitStatistics, load_statistics


def test_steps_of_a_large_model_are_not_timed_without_a_promise(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_now(*_: object, **__: object) -> None:
        raise AssertionError("timing loads both heads and some blocks at once")

    monkeypatch.setattr(decided, "WHOLE_BYTES", 0)
    monkeypatch.setattr(statistics_stage, "measure_costs", not_now)
    result = build(options())
    bundle = result.bundle
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["default"] is None
    assert "statistics.npz" in manifest["files"]  # `plan` has what it needs
    reason = "full depth: not planned, as the model takes 0.0 GB in fp32, and builds time those up"
    assert f"default: {reason}" in result.summary()
    inspected = CliRunner().invoke(app, ["inspect", str(bundle)]).stdout
    assert reason in " ".join(inspected.split())
    model = ojfa_export.load(bundle)
    generated = model.generate("import ", max_new_tokens=2)
    assert generated.prompts[0].exit_blocks == [model.blocks] * 2


def test_what_cannot_change_the_default_is_not_timed(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure_costs(*_: object, **__: object) -> StepCosts:
        asked.append("all")
        return StepCosts.of_steps(exits_ms)

    monkeypatch.setattr(statistics_stage, "measure_costs", measure_costs)
    monkeypatch.setattr(exits, "measure_exits", lambda *_, **__: exits_ms)
    monkeypatch.setattr(exits, "Turns", lambda *_: None)  # no rehearsal
    exits_ms = (1.0, 1.0, 1.0, 1.0)  # no draft saves anything
    default = build(options()).decided.default
    assert default is not None
    assert (default.exit, default.speculation, default.ms_per_token) == ("full", None, 1.0)
    assert asked == []
    exits_ms = (1.0, 1.0, 1e-6, 1.0)  # drafts for nothing, and all of them right
    monkeypatch.setattr(exits, "load_statistics", lambda path: _agreeing(load_statistics(path)))
    default = build(options(overwrite=True)).decided.default
    assert default is not None
    assert default.speculation is not None
    assert asked == ["all"]


def _agreeing(splits: dict[str, ExitStatistics]) -> dict[str, ExitStatistics]:
    return {name: replace(each, agrees=np.ones_like(each.agrees)) for name, each in splits.items()}


def test_without_text_to_look_at_exits_on_it_is_said(
    options: Callable[..., Any], calibration_text: Path, tmp_path: Path
) -> None:
    # As many tokens as fitting and measuring take, and no window more.
    short = tmp_path / "short.txt"
    short.write_text(calibration_text.read_text()[:3000])
    result = build(options(calibration_data=(short,), calibration_tokens=10**6))
    reason = "full depth: not planned, as fitting left no text to look at exits on"
    assert result.decided.default is None
    assert f"default: {reason}" in result.summary()
    inspected = CliRunner().invoke(app, ["inspect", str(result.bundle)]).stdout
    assert reason in " ".join(inspected.split())


def test_what_was_not_timed_by_an_earlier_version(tiny_bundle: Path) -> None:
    spec = ojfa_export.load(tiny_bundle).spec
    reason = decided.why_not_planned(spec, has_statistics=True)
    assert "is timed by now" in reason
