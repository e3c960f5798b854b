"""Populations of text windows whose exits are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ojfa_export.promises.measures import round_down, round_up
from ojfa_export.promises.statistics import ExitStatistics

Population = Callable[..., ExitStatistics]


@pytest.fixture
def population(rng: np.random.Generator) -> Population:
    """Windows that differ in difficulty: tokens of one window are far from independent."""

    def make(
        windows: int = 400,
        tokens: int = 24,
        exits: tuple[int, ...] = (4, 8, 10),
        domains: int = 2,
        ease: float = 1.0,
        blocks: int = 12,
    ) -> ExitStatistics:
        domain = np.repeat(np.arange(domains, dtype=np.int16), windows)
        total = windows * domains
        hardness = rng.gamma(1.5, 0.7, (total, 1, 1)) + 0.4 * domain[:, None, None]
        depth = np.array(exits) / blocks
        score = rng.normal(0, 2.5, (total, tokens, 1)) - hardness + 6 * depth * ease
        score = score + rng.normal(0, 0.5, (total, tokens, len(exits)))
        right = 1 / (1 + np.exp(-score))
        # The confidence knows the token, but not that the window is hard.
        sure = 1 / (1 + np.exp(-score - 0.5 * hardness))
        agrees = rng.random(right.shape) < right
        extra = np.where(agrees, 0, rng.exponential(1.5, right.shape))
        measures = np.stack([sure, 2 * sure - 1, np.log(sure)]).astype(np.float32)
        return ExitStatistics(
            blocks=blocks,
            exits=exits,
            domains=tuple(f"domain{index}" for index in range(domains)),
            domain=domain,
            confidence=round_down(measures),
            agrees=agrees,
            extra_surprisal=round_up(extra.astype(np.float32)),
        )

    return make
