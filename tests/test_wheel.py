"""The wheel: what it holds, and that it runs a bundle where nothing else is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ojfa_export

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# A pyenv shim runs only versions that are chosen; nothing of this checkout must be importable.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYENV_VERSION": "3.10"}

PROGRAM = """
import importlib.util, json, sys
import ojfa_export
model = ojfa_export.load(sys.argv[1])
tokens = [c.token_ids for c in model.generate(["def ", "x"], exit=2, max_new_tokens=6).prompts]
absent = [n for n in ("torch", "transformers", "onnx") if importlib.util.find_spec(n) is None]
print(json.dumps({"file": ojfa_export.__file__, "tokens": tokens, "absent": absent}))
"""


def call(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory)
    call(*build, ROOT, cwd=directory)
    [path] = directory.glob("*.whl")
    return path


def interpreter(version: str) -> str:
    """The tests' own interpreter, or another version's, where there is one."""
    if version == "current":
        return sys.executable
    path = shutil.which(f"python{version}")
    works = path and subprocess.run(
        [path, "-c", "import venv"], env=ENVIRONMENT, capture_output=True, check=False
    )
    if not works or works.returncode:
        pytest.skip(f"python{version} is not installed")
    return path


@pytest.fixture(scope="module", params=["current"])
def fresh_python(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The interpreter of a new environment with the wheel and what it depends on."""
    return install(request.param, wheel, tmp_path_factory.mktemp("fresh"))


def install(version: str, wheel: Path, directory: Path) -> Path:
    call(interpreter(version), "-m", "venv", directory / "venv", cwd=directory)
    python = directory / "venv" / "bin" / "python"
    # The pinned versions need a newer Python than 3.10.
    pins = ["-c", ROOT / "constraints.txt"] if version == "current" else []
    call(python, "-m", "pip", "install", "--quiet", *pins, wheel, cwd=directory)
    return python


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        description = archive.read(metadata).decode()
    for path in (ROOT / "ojfa_export").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    for part in ("text", "recipes"):
        sources = [path for path in (ROOT / "calibration" / part).glob("*") if path.is_file()]
        assert sources
        for path in sources:
            inside = path.relative_to(ROOT / "calibration").as_posix()
            assert f"ojfa_export/_calibration/{inside}" in names
    assert "ojfa_export/py.typed" in names
    assert any(name.startswith("ojfa_export/compiler/report/") and "html" in name for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"ojfa_export"}
    assert not [name for name in names if name.endswith((".safetensors", ".pyc", ".onnx"))]
    assert f"Version: {ojfa_export.__version__}\n" in description
    assert "Requires-Dist: torch" in description
    always = [line for line in description.splitlines() if line.startswith("Requires-Dist:")]
    always = [line for line in always if "extra ==" not in line]
    assert not [line for line in always if "torch" in line or "transformers" in line]


def test_runs_a_bundle(fresh_python, tiny_bundle, tmp_path):
    result = json.loads(call(fresh_python, "-c", PROGRAM, tiny_bundle, cwd=tmp_path))
    assert Path(result["file"]).is_relative_to(fresh_python.parents[1])
    assert result["absent"] == ["torch", "transformers", "onnx"]
    assert result["tokens"] == expected_tokens(tiny_bundle)


def test_the_command_runs_a_bundle(fresh_python, tiny_bundle, tmp_path):
    options = ("--exit", 2, "--max-new-tokens", 6, "--json", "-p", "def ", "-p", "x")
    output = call(fresh_python.with_name("ojfa-export"), "run", tiny_bundle, *options, cwd=tmp_path)
    tokens = [completion["token_ids"] for completion in json.loads(output)["prompts"]]
    assert tokens == expected_tokens(tiny_bundle)


def test_the_command_says_what_works(fresh_python, tmp_path):
    output = call(fresh_python.with_name("ojfa-export"), "doctor", cwd=tmp_path)
    assert "onnxruntime" in output
    assert json.loads(call(fresh_python.with_name("ojfa-export"), "doctor", "--json", cwd=tmp_path))


def test_python_3_10_has_all_but_the_cpu_backend(wheel, tiny_bundle, tmp_path):
    """ONNX Runtime's ragged passes are there from 3.11 on; TensorRT 8.6 has bindings for 3.10."""
    program = install("3.10", wheel, tmp_path).with_name("ojfa-export")
    assert "4 blocks" in call(program, "inspect", tiny_bundle, cwd=tmp_path)
    done = subprocess.run(
        [program, "run", tiny_bundle, "-p", "x"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: backend 'onnxruntime' can't be used")
    assert "doctor" in hint


def expected_tokens(bundle: Path) -> list[list[int]]:
    completions = ojfa_export.load(bundle).generate(["def ", "x"], exit=2, max_new_tokens=6).prompts
    return [completion.token_ids for completion in completions]
