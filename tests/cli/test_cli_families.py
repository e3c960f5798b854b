"""`families`, and what is said of a family that isn't there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ojfa_export.models.families import FAMILIES


def test_families_are_listed(invoke) -> None:
    listed = json.loads(invoke("families", "--json").stdout)
    assert list(listed) == sorted(FAMILIES)
    table = invoke("families").stdout
    for name, models in listed.items():
        assert name in table
        assert models in table


def test_an_unknown_family_names_the_nearest(invoke, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    fields = json.loads((copy / "config.json").read_text())
    for name, nearest in (("qwen", "; the nearest is 'qwen3'"), ("rwkv", "smollm3, stablelm\n")):
        (copy / "config.json").write_text(json.dumps({**fields, "model_type": name}))
        result = invoke("build", copy, "-o", tmp_path / "out.ojfa")
        assert result.exit_code == 1
        assert f"model family '{name}' is not supported" in result.stderr
        assert nearest in result.stderr
