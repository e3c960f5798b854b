"""Builds of the tiny checkpoint, here and in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import steps

from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.report import figures
from ojfa_export.compiler.report.model import CalibrationReport

PICTURES = ("precision_by_exit", "surprisal_by_exit", "precision_matrix")

Options = Callable[..., BuildOptions]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def _draw_once() -> Iterator[None]:
    """Draws the pictures of equal reports once: half of what a tiny build takes.

    That they are drawn alike every time is seen by the builds in processes of their own.
    """
    drawn: dict[tuple[str, str], bytes] = {}

    def once(name: str, draw: Callable[[CalibrationReport], bytes]) -> Callable[..., bytes]:
        def draw_or_recall(report: CalibrationReport) -> bytes:
            key = (name, report.model_dump_json())
            if key not in drawn:
                drawn[key] = draw(report)
            return drawn[key]

        return draw_or_recall

    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(figures, name, once(name, getattr(figures, name)))
        yield


@pytest.fixture
def options(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> Options:
    """The options of `tiny_bundle`, with another output."""

    def make(**changes: Any) -> BuildOptions:
        plain: dict[str, Any] = {
            "checkpoint": str(tiny_checkpoint),
            "output": tmp_path / "out.ojfa",
            "rank": 8,
            "shortcut": "ojfa",
            "calibration_data": (calibration_text,),
            "calibration_tokens": 1024,
            "max_cache_length": 64,
            "skip_verification": True,
        }
        return BuildOptions(**{**plain, **changes})

    return make


@pytest.fixture
def build_in_process() -> Run:
    """Builds in a fresh process, which is killed at a step if one is given."""

    def run(
        options: BuildOptions, stop: int = -1, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
        arguments = json.dumps(asdict(options), default=str)
        return subprocess.run(
            [sys.executable, steps.__file__, arguments, str(stop)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
