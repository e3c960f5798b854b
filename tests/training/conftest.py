"""Small trainings of the tiny checkpoint, here and in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import killed_training
import pytest
import torch
from tiny_models import make_checkpoint
from trainings import Checkpoints, Options, Run

from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.training.options import TrainOptions
from ojfa_export.writing.frozen import Frozen


@pytest.fixture
def options(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> Options:
    """Options of a training of a few steps."""

    def make(**changes: Any) -> TrainOptions:
        plain: dict[str, Any] = {
            "checkpoint": str(tiny_checkpoint),
            "output": tmp_path / "jump.safetensors",
            "text": (calibration_text,),
            "tokens": "20k",
            "device": "cpu",
        }
        return TrainOptions(**{**plain, **changes})

    return make


@pytest.fixture
def train_in_process() -> Run:
    """Trains in a fresh process, which is killed after so many reports of progress if any."""

    def run(options: TrainOptions, stop: int = -1) -> subprocess.CompletedProcess[str]:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [
                sys.executable,
                killed_training.__file__,
                json.dumps(asdict(options), default=str),
                str(stop),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Random checkpoints by the name of their variant."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            directory = tmp_path_factory.mktemp("training") / name
            made[name] = Checkpoint(make_checkpoint(name, directory, seed=3))
        return made[name]

    return make


@pytest.fixture
def frozen(tiny_checkpoint: Path) -> Frozen:
    return Frozen(Checkpoint(tiny_checkpoint), torch.device("cpu"))
