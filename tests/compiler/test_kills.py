"""The program, killed while it builds: no bundle is lost, and the same command goes on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from kills import kill_builds

# Of each command; `python tests/compiler/kills.py 40` does it more often.
TIMES = 3


@pytest.mark.slow
def test_kills_at_random_moments(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    choose = random.Random(int(rng.integers(2**32)))
    killed = kill_builds(tiny_checkpoint, calibration_text, tmp_path, TIMES, choose)
    assert killed > 0
