"""Whole builds of families whose factors or fields are their own, with every check of a build."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_models import make_checkpoint

from ojfa_export.cli.app import app
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.compiler.report import figures
from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.verify import verify_bundle

BUILDS = [
    ("granite-tied", {"precision": "fp16", "shortcut": "ojfa", "rank": 8}),
    ("phi4-mini", {"shortcut": "ojfa", "rank": 8}),
    ("qwen3-sliding-window", {"precision": "fp16", "shortcut": "ojfa", "rank": 8}),
    ("smollm3", {"shortcut": "ojfa", "rank": 8}),
    ("gpt_neox", {"precision": "fp16", "shortcut": "ojfa", "rank": 8}),
    ("olmo2", {"shortcut": "residual", "rank": 8}),
    ("gemma2", {"precision": "fp16", "shortcut": "ojfa", "rank": 8}),
    ("gemma2-untied", {"shortcut": "residual", "rank": 8}),
    ("gemma3_text-capped", {"shortcut": "ojfa", "rank": 8}),
]
# What `inspect` says of the parts that few families have.
SHOWN = {
    "qwen3-sliding-window": "window 8 in 2 blocks",
    "smollm3": "16 rotated features in 2 blocks",
    "gpt_neox": "160 features, gelu, beside attention",
    "olmo2": "after attention and MLP, also of all heads of queries and of keys",
    "gemma2": "before and after attention and MLP",
    "gemma2-untied": "32 features each, window 8 in 2 blocks, softcap 2",
    "gemma3_text-capped": "32 rotated features, otherwise in 3 blocks",
}


def _first(draw: Any, drawn: list[bytes], report: CalibrationReport) -> bytes:
    if not drawn:
        drawn.append(draw(report))
    return drawn[0]


@pytest.fixture(scope="module", autouse=True)
def _draw_once() -> Iterator[None]:
    """Draws each picture of the first report alone: families have none of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("precision_by_exit", "surprisal_by_exit", "precision_matrix"):
            patch.setattr(figures, name, functools.partial(_first, getattr(figures, name), []))
        yield


@pytest.mark.parametrize(("name", "options"), BUILDS, ids=lambda each: str(each))
def test_build_and_verify(
    tmp_path: Path, calibration_text: Path, name: str, options: dict[str, Any]
) -> None:
    directory = make_checkpoint(name, tmp_path / "checkpoint", seed=7, config_style="v4")
    # As published ones have; without it transformers gives some families a tokenizer of their own.
    class_of_all = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(class_of_all)
    asked = BuildOptions(
        str(directory), tmp_path / "out.ojfa", calibration_data=(calibration_text,),
        calibration_tokens=1024, max_cache_length=64, **options,
    )  # fmt: skip
    bundle = build(asked).bundle
    shown = CliRunner().invoke(app, ["inspect", str(bundle)]).stdout
    assert SHOWN.get(name, "") in " ".join(shown.split())
    checks = verify_bundle(bundle, str(directory), "onnxruntime", SILENT)
    assert [check.name for check in checks if not check.passed] == []
