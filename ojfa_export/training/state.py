"""The state of a training under way, on the disk, to go on as if nothing had been."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ojfa_export.errors import OjfaError
from ojfa_export.system.atomic import write_atomically

# Seconds between two saves at least, and of the time that passes, what saving may take.
SAVE_SECONDS = 20.0
SAVE_SHARE = 0.1


@dataclass
class State:
    """How far a training is. What steps look at follows from their numbers (`draw`).

    Attributes:
        step: Steps taken.
        jump: The jump's tensors.
        optimiser: Of the optimiser.
        best: The tensors of the best state so far, by held-out loss.
        best_step: When that was; 0 is before training.
        best_loss: Its held-out loss.
        stale: Checks on the held-out text since then.
        history: Step and held-out loss of every check.
        seconds: Of the runs before this one.
    """

    step: int
    jump: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    best: Mapping[str, Tensor]
    best_step: int
    best_loss: float
    stale: int
    history: list[tuple[int, float]]
    seconds: float


class Keeper:
    """Saves states, not too often.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._due = time.monotonic() + SAVE_SECONDS

    def load(self, device: torch.device) -> State | None:
        """The state that is there, if any.

        Raises:
            OjfaError: It is damaged.
        """
        if not self._path.exists():
            return None
        try:
            found = torch.load(self._path, map_location=device, weights_only=True)
            history = [(step, loss) for step, loss in found["history"]]
            return State(**{**found, "history": history})
        except Exception as error:  # torch has no one exception for a damaged file
            raise OjfaError(
                f"{self._path}, from which this training would go on, is damaged",
                hint="remove it: the training begins anew",
            ) from error

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self._due

    def save(self, state: State) -> None:
        """Writes a state in the place of the last one, whole or not at all.

        Raises:
            OSError: It can't be written, on a full disk for example.
        """
        start = time.monotonic()
        buffer = io.BytesIO()
        torch.save(vars(state), buffer)
        write_atomically(self._path, buffer.getvalue())
        end = time.monotonic()
        self._due = end + max(SAVE_SECONDS, (end - start) / SAVE_SHARE)
