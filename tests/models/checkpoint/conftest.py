"""A checkpoint to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def directory(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
