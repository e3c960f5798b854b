"""The attack as a test: a share of it in every run, the whole with `-m slow`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def _attack(rng: np.random.Generator, *arguments: str) -> None:
    """Runs the program as anyone would: it forks, which this process with its threads must not."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, "-m", "tests.attack", "--seed", str(rng.integers(2**31)), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(process.stdout[-20_000:], process.stderr[-2000:])
    assert process.returncode == 0


def test_a_share_of_the_attack_finds_nothing(rng: np.random.Generator) -> None:
    # Python alone: C++'s part of it needs the sanitized program, and runs with the whole.
    python_alone = ("--ojfa-run", str(ROOT / "absent"))
    some = ("--classes", "damage", "lie", "value", "--share", "0.015", "--jobs", "1")
    _attack(rng, *some, *python_alone)


@pytest.mark.slow
def test_the_whole_attack_finds_nothing(
    rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes a quarter of an hour: pytest -m slow tests/attack")
    _attack(rng)
