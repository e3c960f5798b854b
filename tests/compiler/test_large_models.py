"""What a build leaves out of a model that would take too much memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ojfa_export
from ojfa_export.cli.app import app
from ojfa_export.compiler import decided, exits
from ojfa_export.compiler.pipeline import build


def test_steps_of_a_large_model_are_not_timed_without_a_promise(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_now(*_: object, **__: object) -> None:
        raise AssertionError("timing loads both heads and some blocks at once")

    monkeypatch.setattr(decided, "WHOLE_BYTES", 0)
    monkeypatch.setattr(exits, "measure_costs", not_now)
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
