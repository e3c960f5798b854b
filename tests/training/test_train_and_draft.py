"""A draft as it is trained, built and used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from trainings import Options

import ojfa_export
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.training.train import train


def test_a_trained_draft_is_built_and_drafts(
    options: Options, tiny_checkpoint: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    asked = options(jump="draft", vocabulary=64, tokens="6k", passes=2)
    train(asked)
    bundle = tmp_path / "bundle"
    build(BuildOptions(str(tiny_checkpoint), bundle, shortcut=asked.output, skip_verification=True))
    model = ojfa_export.load(bundle)
    prompts = [rng.integers(0, 300, size=12).tolist() for _ in range(3)]
    settings = {"max_new_tokens": 20, "ignore_eos": True}
    full = model.generate(prompts, exit="full", **settings)
    drafted = model.generate(prompts, exit="full", speculate=Speculation(0, 3), **settings)
    for one, other in zip(full.prompts, drafted.prompts, strict=True):
        assert one.token_ids == other.token_ids
