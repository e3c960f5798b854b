"""Fixtures shared by all tests."""

from __future__ import annotations

import argparse
import gc
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collections, of which each build makes some."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers in every run; set OJFA_TEST_SEED to repeat a run."""
    seed = int(os.environ.get("OJFA_TEST_SEED", np.random.SeedSequence().entropy % 2**32))  # type: ignore[operator]
    print(f"{request.node.name}: OJFA_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text, enough for a tiny model: about 40,000 tokens of its tokenizer."""
    path = tmp_path_factory.mktemp("text") / "source.txt"
    path.write_text(inspect.getsource(argparse), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four blocks with grouped heads; not to be written to."""
    from tiny_models import make_checkpoint

    return make_checkpoint("llama-gqa", tmp_path_factory.mktemp("tiny") / "checkpoint", seed=11)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, calibration_text: Path) -> Path:
    """The bundle of `tiny_checkpoint`, its shortcut of rank 8; not to be written to."""
    from ojfa_export.compiler.options import BuildOptions
    from ojfa_export.compiler.pipeline import build

    options = BuildOptions(
        str(tiny_checkpoint),
        tiny_checkpoint.with_name("tiny.ojfa"),
        rank=8,
        shortcut="ojfa",
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=64,
        skip_verification=True,
    )
    return build(options).bundle


@pytest.fixture
def random_shortcut(rng: np.random.Generator) -> Callable[..., Any]:
    """Makes shortcuts of a hidden size and a rank."""
    from ojfa_export.bundle.shortcut import Shortcut

    def make(hidden: int, rank: int, fitted_at: int = 3, residual: bool = False) -> Any:
        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        return Shortcut(
            scale=normal(hidden),
            shift=normal(hidden),
            down=normal(hidden, rank),
            up=normal(rank, hidden),
            kind="n-njtc",
            fitted_at=fitted_at,
            residual=residual,
        )

    return make
