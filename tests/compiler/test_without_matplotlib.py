"""A build that couldn't draw its report says so before it begins."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ojfa_export.compiler import pipeline
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.errors import UsageError


@pytest.mark.parametrize("run", [pipeline.build, pipeline.plan])
def test_what_is_missing_is_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find(name, *rest),
    )
    options = BuildOptions(str(tmp_path / "no-checkpoint"), tmp_path / "out.ojfa")
    with pytest.raises(UsageError, match="matplotlib, which isn't installed") as caught:
        run(options)
    assert "ojfa-export[build]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
