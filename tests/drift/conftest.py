"""A small bundle whose promise lets tokens leave early."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path

import pytest

from ojfa_export.build.options import BuildOptions
from ojfa_export.build.pipeline import build


@pytest.fixture(scope="session")
def promised(tiny_checkpoint: Path, calibration_text: Path) -> Path:
    """Of a random model, of which little can be promised; not to be written to."""
    prose = calibration_text.with_name("prose.txt")
    prose.write_text(inspect.getsource(pydoc), encoding="utf-8")
    options = BuildOptions(
        str(tiny_checkpoint),
        tiny_checkpoint.with_name("promised.ojfa"),
        rank=8,
        calibration_data=(Path(f"code={calibration_text}"), Path(f"docs={prose}")),
        calibration_tokens=1024,
        max_cache_length=64,
        skip_verification=True,
        max_disagreement=0.5,
    )
    return build(options).bundle
