"""The documentation's examples run as they are written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import tomllib

from ojfa_export.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_examples_run_as_they_are_written(tmp_path: Path) -> None:
    """The console's commands in order, then the Python blocks on the bundle that they build."""
    (tmp_path / "calibration").symlink_to(ROOT / "calibration")
    found = [*blocks("console"), *blocks("console", TRAINING)]
    commands = [line[2:] for block in found for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ojfa-export"
        if arguments[0] == "bench":  # the machine is shared with other tests
            arguments += ["--iterations", "8", "--warmup", "1", "--exit", "6"]
        if arguments[0] == "train":  # what is shown takes minutes
            arguments += ["--tokens", "9k", "--passes", "1"]
        run([sys.executable, "-m", "ojfa_export", *arguments], tmp_path, command)
    for block in [*blocks("python"), *blocks("python", SERVING)]:
        run([sys.executable, "-c", block], tmp_path, block)


def run(command: list[str], place: Path, shown: str) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), shown


def test_every_command_is_named() -> None:
    for command in COMMANDS:
        assert f"`{command}" in README


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("calibration/*/*.md")]:
        if ".venv" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_extras_in_the_hints_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = set(extras["project"]["optional-dependencies"])
    for source in (ROOT / "ojfa_export").rglob("*.py"):
        for extra in re.findall(r"ojfa-export\[([a-z]+)\]", source.read_text(encoding="utf-8")):
            assert extra in named, source
