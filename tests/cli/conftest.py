"""A way to call the command line in this process, and a small real bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import make_checkpoint

from ojfa_export.cli.app import app

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    def call(*args: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama-gqa", tmp_path_factory.mktemp("cli") / "checkpoint", seed=5)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    output = checkpoint.parent / "tiny.ojfa"
    args = ["build", str(checkpoint), "-o", str(output), "--skip-verification", "-q"]
    result = CliRunner().invoke(app, [*args, "--calibration-tokens", "4096", "--rank", "3"])
    assert result.exit_code == 0, result.stderr
    return output
