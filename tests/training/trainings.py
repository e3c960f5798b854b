"""What tests of trainings share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import numpy as np
import torch

from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.training.kinds.jump import Jump
from ojfa_export.training.options import TrainOptions
from ojfa_export.training.windows import TrainingText

Options = Callable[..., TrainOptions]
Run = Callable[..., subprocess.CompletedProcess[str]]
Checkpoints = Callable[[str], Checkpoint]


def random_text(count: int, length: int, given: int = 0) -> TrainingText:
    """Windows of random token ids below 300."""
    ids = np.random.default_rng(0).integers(0, 300, size=(count, length))
    return TrainingText(ids.astype(np.int32), (count,), given, "random")


def scatter(jump: Jump, seed: int) -> None:
    """Random values in every tensor, so that a mistake in any shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in jump.state_dict().values():
            if each.is_floating_point():
                each.add_(0.3 * torch.randn(each.shape, generator=generator))
