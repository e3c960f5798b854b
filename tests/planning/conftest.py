"""Statistics with known probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ojfa_export.promises.measures import MEASURES, round_down
from ojfa_export.promises.statistics import ExitStatistics

Make = Callable[..., ExitStatistics]


@pytest.fixture
def make_statistics(rng: np.random.Generator) -> Make:
    """Tokens that are alike within a window and resemble their neighbours."""

    def make(
        windows: int = 40, tokens: int = 64, run: int = 8, blocks: int = 12, mixing: float = 0.5
    ) -> ExitStatistics:
        exits = tuple(range(1, blocks))
        noise = rng.normal(size=(windows, tokens, 1))
        for at in range(1, tokens):  # an autoregressive difficulty
            noise[:, at] = mixing * noise[:, at - 1] + np.sqrt(1 - mixing**2) * noise[:, at]
        score = 6 * np.array(exits) / blocks - 2 + 1.5 * noise + rng.normal(size=(windows, 1, 1))
        sure = 1 / (1 + np.exp(-score))
        agrees = rng.random(sure.shape) < sure
        return ExitStatistics(
            blocks=blocks,
            exits=exits,
            domains=("code", "docs"),
            domain=(np.arange(windows) % 2).astype(np.int16),
            confidence=np.stack([round_down(sure)] * len(MEASURES)),
            agrees=agrees,
            extra_surprisal=np.where(agrees, 0, 1).astype(np.float16),
            run=run,
        )

    return make
