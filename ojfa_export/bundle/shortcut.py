"""The low-rank jump from a block's output to the final hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.arrays import check_arrays
from ojfa_export.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The jump y = ((h * scale + shift) @ down) @ up, plus h if `residual`.

    A residual jump may have gates, one for each exit: y = h + gate * ((h * scale + shift) @ down)
    @ up. Gate 0 is the identity.

    `scale` and `shift` are a BatchNorm in inference mode: its statistics and its affine
    parameters in two vectors.

    Attributes:
        scale: [H] fp32.
        shift: [H] fp32.
        down: [H, r] fp32.
        up: [r, H] fp32.
        kind: How it was fitted: "n-njtc" for one of a jump per exit, "ojfa" for the one jump
            that serves every exit, "residual" for the one that is added to h.
        fitted_at: Blocks run before the hidden states that it was fitted on, at least 1; of a jump
            that was fitted on all levels together, the first.
        residual: Whether h is added to the output.
        gates: [L-1] fp32 for exits 1..L-1, or None; only of a residual jump.

    Raises:
        ValueError: Arrays of another dtype, of shapes that do not fit together, or not finite.
    """

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    down: NDArray[np.float32]
    up: NDArray[np.float32]
    kind: str
    fitted_at: int
    residual: bool = False
    gates: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.down.ndim != 2:
            raise ValueError(f"down has shape {self.down.shape}, expected [H, r]")
        hidden, rank = self.down.shape
        if not 1 <= rank <= hidden:
            raise ValueError(f"rank {rank} is outside 1..{hidden}")
        if self.gates is not None and not self.residual:
            raise ValueError("gates are for a residual jump")
        self._check_arrays(hidden, rank)
        if not self.kind:
            raise ValueError("kind is empty")
        if self.fitted_at < 1:
            raise ValueError(f"fitted_at is {self.fitted_at}, expected at least 1")

    def _check_arrays(self, hidden: int, rank: int) -> None:
        expected: dict[str, tuple[int, ...]] = {
            "scale": (hidden,),
            "shift": (hidden,),
            "down": (hidden, rank),
            "up": (rank, hidden),
        }
        if self.gates is not None:
            expected["gates"] = (max(1, self.gates.size),)
        check_arrays(self, expected)

    @property
    def hidden_size(self) -> int:
        """H, the length of a hidden state."""
        return int(self.down.shape[0])

    @property
    def rank(self) -> int:
        """r, the number of directions that pass through the jump."""
        return int(self.down.shape[1])

    @property
    def parameters(self) -> int:
        """The number of stored weights, 2 H r + 2 H, and the gates."""
        gates = 0 if self.gates is None else self.gates.size
        return self.scale.size + self.shift.size + self.down.size + self.up.size + gates

    def apply(self, h: NDArray[Any], blocks_run: int | None = None) -> NDArray[Any]:
        """Predicts the last block's output, before the final norm.

        Args:
            h: [..., H] hidden states after some block, any float dtype.
            blocks_run: After which block, 1..L-1; a jump with gates needs to know.

        Returns:
            [..., H], float64 for float64 input and float32 otherwise.

        Raises:
            ValueError: A jump with gates, and no exit that it has a gate for.
        """
        y = ((h * self.scale + self.shift) @ self.down) @ self.up
        if not self.residual:
            return y
        return h + self.gate(blocks_run) * y

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuses a jump of another kind of model.

        Raises:
            ValueError: What doesn't fit.
        """
        if self.hidden_size != spec.hidden_size:
            raise ValueError(
                f"its hidden size is {self.hidden_size}, the model's {spec.hidden_size}"
            )
        if self.gates is not None and self.gates.size != spec.blocks - 1:
            raise ValueError(f"it serves {self.gates.size} exits, the model has {spec.blocks - 1}")

    def gate(self, blocks_run: int | None) -> np.float32:
        """The gate of an exit, 1 for a jump without gates.

        Raises:
            ValueError: A jump with gates, and no exit that it has a gate for.
        """
        if self.gates is None:
            return np.float32(1)
        if blocks_run is None or not 1 <= blocks_run <= self.gates.size:
            raise ValueError(f"no gate for exit {blocks_run}, only for 1..{self.gates.size}")
        gate: np.float32 = self.gates[blocks_run - 1]
        return gate
