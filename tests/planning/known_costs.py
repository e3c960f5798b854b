"""Known costs, and engines that take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.measures import MEASURES


def step_costs(blocks: int = 12, **changes: Any) -> StepCosts:
    """Of equal blocks: embedding 0.1, a block 1, the exit head 0.2, the model's own 0.4."""
    exits = [0.3 + depth for depth in range(1, blocks)] + [0.5 + blocks]
    plain: dict[str, Any] = {
        "exits": exits, "exit_head": 0.2, "final_head": 0.4, "final_row": 0.1, "decide": 0.0,
        "checks": dict.fromkeys(MEASURES, 0.2), "catch_up": 0.5, "waiting": 0.25,
    }  # fmt: skip
    return StepCosts.model_validate({**plain, **changes})


class ClockedEngines(ChoosesOnHost):
    """Engines whose work takes the time of `step_costs` on a clock of their own (seconds)."""

    def __init__(self, engines: Any) -> None:
        self._engines = engines
        self.now = 0.0

    def clock(self) -> float:
        return self.now / 1e3

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def logits(self, hidden: np.ndarray, blocks_run: int) -> np.ndarray:
        final = blocks_run == self._engines.spec.blocks
        self.now += 0.4 + 0.1 * (len(hidden) - 1) if final else 0.2
        return self._engines.logits(hidden, blocks_run)

    def executor(self, slots: int, capacity: int) -> Any:
        executor = self._engines.executor(slots, capacity)
        embed, run = executor.embed, executor.run

        def clocked_embed(tokens: Any, chunks: Any) -> np.ndarray:
            self.now += 0.1
            return embed(tokens, chunks)

        def clocked(blocks: range, hidden: np.ndarray, *arguments: Any, **named: Any) -> np.ndarray:
            more = len(hidden) - 1
            self.now += len(blocks) * (1 + 0.5 * (more > 0) + 0.25 * more)
            return run(blocks, hidden, *arguments, **named)

        executor.embed, executor.run = clocked_embed, clocked
        return executor
