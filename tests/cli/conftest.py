"""A way to call the command line in this process, and a small real bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_models import make_checkpoint

import ojfa_export
from ojfa_export.bundle.manifest import read_manifest
from ojfa_export.bundle.names import MANIFEST
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
    """Of the text that ships, as for users; other tests here take `calibration_text`."""
    output = checkpoint.parent / "tiny.ojfa"
    args = ["build", str(checkpoint), "-o", str(output), "--skip-verification", "-q"]
    args += ["--shortcut", "ojfa"]
    result = CliRunner().invoke(app, [*args, "--calibration-tokens", "4096", "--rank", "3"])
    assert result.exit_code == 0, result.stderr
    # What is planned depends on how fast the machine is just now.
    manifest = read_manifest(output).model_copy(update={"default": None})
    (output / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return output


@pytest.fixture(scope="session")
def bundle_with_policy(bundle: Path) -> Path:
    """The same, with an exit policy of which about half of the tokens exit at 2."""
    model = ojfa_export.load(bundle)
    session, ids, seen = model.session(), model.encode("def main("), []
    never = ojfa_export.ExitPolicy(exits=(2,), measure="top", thresholds=(2.0,))
    for _ in range(30):
        step = session.decide(ids, never)
        ids = [int(step.logits[0].argmax())]
        seen.append(step.confidence[0, 0])
    policy = never.model_copy(update={"thresholds": (float(np.median(seen)),)})
    output = bundle.with_name("policy.ojfa")
    shutil.copytree(bundle, output)
    manifest = model.manifest.model_copy(update={"auto": policy})
    (output / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return output
