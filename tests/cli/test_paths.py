"""Names that are no UTF-8, or hold newlines and control characters, wherever a path is taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ojfa_export.bundle.bundle import Bundle

Invoke = Callable[..., Result]

BAD = os.fsdecode(b"name\xff")
CONTROL = "a\nb\x1b[31m"
# Arguments by name: {bad} has such a name and is nothing, {bundle} and {checkpoint} are in it.
REFUSED = {
    "build": "build {checkpoint} -o {bad}",
    "deep": "build {checkpoint} -o {bad}/deep",
    "dry run": "build {checkpoint} -o {bad} --dry-run",
    "checkpoint": "build {bad_checkpoint} -o out",
    "link to a checkpoint": "build {link} -o out",
    "no model": "build {bad} -o out",
    "calibrate": "calibrate {checkpoint} -o {bad}",
    "compare": "compare {checkpoint} -o {bad}",
    "export": "export {checkpoint} -o {bad}",
    "shortcut": "export {checkpoint} -o out --shortcut {bad}",
    "engines": "build {bad_bundle}",
    "run": "run {bad_bundle} -p x",
    "verify": "verify {bad_bundle}",
    "inspect": "inspect {bad_bundle}",
    "plan": "plan {bad_bundle}",
    "bench": "bench {bad_bundle}",
    "monitor": "monitor {bad_bundle} log",
    "recipe": "build {checkpoint} -o out --recipe {bad}.toml",
    "calibration data": "build {checkpoint} -o out --calibration-data {bad}",
    "text": "bench {bundle} --prompt-length 1 --iterations 1 --text {bad}",
    "log": "monitor {bundle} {bad}",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(
    case: str,
    invoke: Invoke,
    checkpoint: Path,
    bundle: Path,
    bundle_with_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"checkpoint{BAD}").symlink_to(checkpoint)
    shutil.copytree(bundle, f"bundle{BAD}", copy_function=os.link)
    shutil.copytree(checkpoint, f"copy{BAD}", copy_function=os.link)
    Path("link").symlink_to(f"copy{BAD}")
    Path("log").write_text("x\n")
    before = sorted(tmp_path.rglob("*"))
    words = {
        "checkpoint": checkpoint,
        "bundle": bundle_with_policy,
        "bad": BAD,
        "bad_checkpoint": f"copy{BAD}",
        "bad_bundle": f"bundle{BAD}",
        "link": "link",
    }
    result = invoke("-q", *(word.format(**words) for word in REFUSED[case].split()))
    assert result.exit_code in (1, 2)
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert "internal error" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_work(
    invoke: Invoke,
    checkpoint: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(calibration_text, BAD)
    arguments = ["--skip-verification", "--shortcut", "ojfa", "--calibration-tokens", "1024"]
    data = ["--calibration-data", BAD]
    result = invoke("-q", "build", checkpoint, "-o", CONTROL, *data, *arguments)
    assert result.exit_code == 0, result.stderr
    opened = Bundle(tmp_path / CONTROL)
    (source,) = opened.manifest.calibration.sources
    assert source.name == r"name\xff"
    for command in (["inspect"], ["build"], ["run", "-p", "x", "--max-new-tokens", 2]):
        result = invoke("-q", *command, CONTROL)
        assert result.exit_code == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {BAD, CONTROL}
