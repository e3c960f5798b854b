"""Engines whose logits are a little off: what they change in a result hangs on a near tie."""

from __future__ import annotations

from typing import Any

import numpy as np

from ojfa_export.backends.choice import ChoosesOnHost


class Noisy(ChoosesOnHost):
    """Other engines, whose every logit has noise added.

    Args:
        engines: The engines.
        seed: Of the noise.
        noise: The most that is added, relative to the largest logit.
    """

    def __init__(self, engines: Any, seed: int, noise: float) -> None:
        self._engines, self._rng, self._noise = engines, np.random.default_rng(seed), noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def logits(self, hidden: Any, blocks_run: int) -> Any:
        logits = self._engines.logits(hidden, blocks_run)
        noise = self._rng.uniform(-1, 1, logits.shape) * self._noise * np.abs(logits).max()
        return (logits + noise).astype(np.float32)
