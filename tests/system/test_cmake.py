"""The C++ runtime as a CMake package: where it is, and that a wheel carries it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ojfa_export.system.cmake import cmake_directory

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_names_the_package():
    done = subprocess.run(
        [sys.executable, "-m", "ojfa_export", "--cmake-dir"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == cmake_directory()
    assert (cmake_directory() / "ojfaConfigVersion.cmake").is_file()


def test_a_wheel_has_all_that_cmake_refers_to():
    """Every folder of engines/ but tests, tools and examples, which a consumer doesn't build."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    left_out = {"tests", "tools", "examples", "build"}
    for path in (ROOT / "engines").iterdir():
        if path.name in left_out or path.name.startswith(".") or path.suffix in (".md", ".json"):
            continue
        if path.name == "test.sh":
            continue
        assert f'"engines/{path.name}" = "ojfa_export/_engines/{path.name}"' in text
