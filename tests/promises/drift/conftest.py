"""A small bundle whose promise lets tokens leave early."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path

import pytest

from ojfa_export.compiler import statistics_stage
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.measures import MEASURES

# Of four blocks: equal ones, and nothing is as dear.
COSTS = StepCosts(
    exits=(1.1, 2.1, 3.1, 4.3), exit_head=0.1, final_head=0.3, final_row=0.1, decide=0.0,
    checks=dict.fromkeys(MEASURES, 0.1), catch_up=0.0, waiting=0.0,
)  # fmt: skip


@pytest.fixture(scope="session")
def promised(tiny_checkpoint: Path, calibration_text: Path) -> Path:
    """Of a random model, of which little can be promised; not to be written to."""
    prose = calibration_text.with_name("prose.txt")
    prose.write_text(inspect.getsource(pydoc), encoding="utf-8")
    options = BuildOptions(
        str(tiny_checkpoint),
        tiny_checkpoint.with_name("promised.ojfa"),
        rank=8,
        shortcut="residual",
        calibration_data=(Path(f"code={calibration_text}"), Path(f"docs={prose}")),
        calibration_tokens=1024,
        max_cache_length=64,
        skip_verification=True,
        max_disagreement=0.5,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Measured times decide whether any token should leave early; here some must.
        patch.setattr(statistics_stage, "measure_costs", lambda *_, **__: COSTS)
        return build(options).bundle
