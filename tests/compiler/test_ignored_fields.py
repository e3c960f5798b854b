"""`--ignore-config-field`: on every command that reads a checkpoint, and in the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ojfa_export.cli.app import app
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.errors import UsageError

IGNORE = ("--ignore-config-field", "brand_new")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"brand_new": 1}))
    return directory


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in args])


@pytest.mark.parametrize("command", ["build", "calibrate", "export", "compare"])
def test_commands_that_read_a_checkpoint(
    command: str, checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    text = () if command == "export" else ("--calibration-data", calibration_text)
    args = (command, checkpoint, "-o", tmp_path / "out", *text)
    refused = run(*args)
    assert refused.exit_code == 1
    assert "error: " in refused.stderr
    assert "not understood for family 'llama': brand_new" in refused.stderr
    assert "hint: " in refused.stderr
    assert " ".join(IGNORE) in refused.stderr
    assert not (tmp_path / "out").exists()
    if command == "export":
        assert run(*args, *IGNORE).exit_code == 0


def test_bundle_says_what_was_ignored(
    checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "out.ojfa"
    built = run(
        "build", checkpoint, "-o", bundle, "--rank", 8, "--shortcut", "ojfa", "--max-cache-length",
        64, "--calibration-data", calibration_text, "--calibration-tokens", 1024, *IGNORE,
    )  # fmt: skip
    assert built.exit_code == 0, built.stderr
    manifest = json.loads(run("inspect", bundle, "--json").stdout)
    assert manifest["model"]["ignored_fields"] == ["brand_new"]
    assert "ignored fields" in run("inspect", bundle).stdout
    verified = run("verify", bundle, "--against", checkpoint)
    assert verified.exit_code == 0, verified.stderr
    again = run("build", bundle, *IGNORE)
    assert again.exit_code == 2
    assert "--ignore-config-field can't be changed in a bundle" in again.stderr


@pytest.mark.parametrize("value", ["brand_new", [1], 5])
def test_names_that_are_none(value: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ignore-config-fields must be"):
        BuildOptions("x", tmp_path, ignore_config_fields=value)  # type: ignore[arg-type]
