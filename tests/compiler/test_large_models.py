"""What a build leaves out of a model that would take too much memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import ojfa_export
from ojfa_export.compiler import exits
from ojfa_export.compiler.pipeline import build


def test_steps_of_a_large_model_are_not_timed_without_a_promise(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_now(*_: object, **__: object) -> None:
        raise AssertionError("timing loads both heads and some blocks at once")

    monkeypatch.setattr(exits, "WHOLE_BYTES", 0)
    monkeypatch.setattr(exits, "measure_costs", not_now)
    bundle = build(options()).bundle
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["default"] is None
    assert "statistics.npz" in manifest["files"]  # `plan` has what it needs
    model = ojfa_export.load(bundle)
    result = model.generate("import ", max_new_tokens=2)
    assert result.prompts[0].exit_blocks == [model.blocks] * 2
