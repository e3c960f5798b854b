"""The runtime runs where nothing is installed that only building needs, on Python 3.10 too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ojfa_export

BUILD_ONLY = [
    "accelerate",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "ml_dtypes",
    "onnx",
    "safetensors",
    "torch",
    "transformers",
]

PROGRAM = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = set(json.loads(sys.argv[2]))
sys.meta_path.insert(0, Absent())
import ojfa_export
result = ojfa_export.load(sys.argv[1]).generate(["def ", "x"], max_new_tokens=4, exit=2)
full = ojfa_export.load(sys.argv[1]).generate("def ", max_new_tokens=4)
loaded = sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules})
files = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "ojfa_export"]
tokens = [completion.token_ids for completion in result.prompts + full.prompts]
print(json.dumps({"tokens": tokens, "loaded": loaded, "files": files}))
"""


@pytest.fixture(scope="module")
def isolated_run(tiny_bundle: Path) -> dict:
    command = [sys.executable, "-c", PROGRAM, str(tiny_bundle), json.dumps(BUILD_ONLY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generates_without_what_building_needs(isolated_run, tiny_bundle):
    assert isolated_run["loaded"] == []
    model = ojfa_export.load(tiny_bundle)
    batch = model.generate(["def ", "x"], max_new_tokens=4, exit=2)
    full = model.generate("def ", max_new_tokens=4)
    assert isolated_run["tokens"] == [c.token_ids for c in batch.prompts + full.prompts]


def test_the_block_works(tiny_bundle):
    """The same program with a blocked runtime dependency fails, by the block."""
    command = [sys.executable, "-c", PROGRAM, str(tiny_bundle), json.dumps(["tokenizers"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "tokenizers is blocked" in done.stderr


def test_public_names():
    for name in ojfa_export.__all__:
        assert getattr(ojfa_export, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = ojfa_export.absent
    assert ojfa_export.__version__.count(".") >= 2


def test_importing_the_package_imports_nothing_else():
    program = "import sys, ojfa_export; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    names = {name.partition(".")[0] for name in done.stdout.split()}
    assert not names & {*BUILD_ONLY, "numpy", "onnxruntime", "tokenizers", "pydantic"}


def test_the_runtime_is_python_3_10(isolated_run, tmp_path):
    """Every module that running a bundle imports compiles there; test_wheel.py runs it there."""
    python = shutil.which("python3.10")
    # A pyenv shim runs only versions that are chosen.
    environment = {**os.environ, "PYENV_VERSION": "3.10", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    version = python and subprocess.run(
        [python, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    if not version or version.returncode:
        pytest.skip("python3.10 is not installed")
    files = isolated_run["files"]
    assert len(files) > 10
    done = subprocess.run(
        [python, "-m", "py_compile", *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
