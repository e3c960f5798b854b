"""Where the C++ programs are, how many examples, and which."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# The folder of the built programs, which engines/test.sh sets.
PROGRAMS = os.environ.get("OJFA_REPLAY_PROGRAMS")
# As often as this more examples: 1 in CI, more for a long run.
TIMES = float(os.environ.get("OJFA_TEST_TIMES", "1"))
SEED = int(os.environ.get("OJFA_TEST_SEED", np.random.SeedSequence().entropy % 2**32))  # type: ignore[operator]

needs_programs = pytest.mark.skipif(
    PROGRAMS is None,
    reason="OJFA_REPLAY_PROGRAMS doesn't say where the C++ programs are; engines/test.sh does",
)


def program(name: str) -> Path:
    """A built C++ program."""
    assert PROGRAMS is not None
    return Path(PROGRAMS).resolve() / name


def examples(count: int) -> hypothesis.settings:
    """So many fresh examples; of those that fail the smallest is left to say what differs."""
    print(f"OJFA_TEST_SEED={SEED}")
    return hypothesis.settings(
        max_examples=max(1, round(count * TIMES)),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
