"""Help is there, whatever else is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ojfa_export._version import __version__
from ojfa_export.cli.app import COMMANDS

HEAVY = ("numpy", "torch", "onnx", "onnxruntime", "transformers", "pydantic", "rich", "tokenizers")

# Refuses to import heavy packages, as if they were not installed, and tells of every attempt.
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            print("tried to import", name)
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from ojfa_export.cli import main
main()
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_no_heavy_package(command: str | None) -> None:
    args = [] if command is None else [command]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *args, "--help"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "tried to import" not in result.stdout
    assert result.stdout.startswith(f"Usage: ojfa-export {command or '[OPTIONS]'}")
    assert "--json" in result.stdout


def test_help_of_the_program_names_every_command(invoke) -> None:
    listed = invoke("--help").stdout.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(COMMANDS)
    assert "..." not in listed  # no summary is cut off


def test_version(invoke) -> None:
    assert invoke("--version").stdout == f"ojfa-export {__version__}\n"


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ojfa_export", "--version"], capture_output=True, text=True
    )
    assert result.stdout == f"ojfa-export {__version__}\n"


def test_no_command_is_wrong_usage(invoke) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Commands:" in result.stderr
