"""The MLP shortcut: one MLP of the model's own kind takes any exit's hidden state to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.arrays import check_arrays
from ojfa_export.models.activation import activate, gated
from ojfa_export.models.spec import Activation, ModelSpec, NormKind


@dataclass(frozen=True, eq=False)
class MlpShortcut:
    """The jump y = h + act(x up) down, x = norm(h) * scale[k] + shift[k] after block k.

    With a gate, as in Llama's SwiGLU, act(x up) is act(x gate) * (x up), gate's columns first.
    One MLP serves every exit; what an exit has of its own is a scale and a shift of the MLP's
    input. It needs no keys and values. Norm, activation and gate are those of the model's own
    blocks, so that the kernels of a block run it; the norm has no weights of its own.

    Attributes:
        scale: [L-1, H] fp32, for exits 1..L-1.
        shift: [L-1, H] fp32.
        up: [H, width] fp32, or [H, 2 width] with a gate.
        down: [width, H] fp32.
        norm: "rms", or "layer", which takes the mean off first.
        epsilon: Of the norm.
        activation: Between the matrices.
        gate: Whether there is one.

    Raises:
        ValueError: Arrays of another dtype, of shapes that do not fit together, or not finite.
    """

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    norm: NormKind
    epsilon: float
    activation: Activation
    gate: bool

    kind: Literal["mlp"] = "mlp"

    def __post_init__(self) -> None:
        for name in ("scale", "down"):
            if getattr(self, name).ndim != 2:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected two axes")
        (exits, hidden), (width, _) = self.scale.shape, self.down.shape
        columns = 2 * width if self.gate else width
        expected = {
            "scale": (max(1, exits), hidden),
            "shift": (exits, hidden),
            "up": (hidden, columns),
            "down": (max(1, width), hidden),
        }
        check_arrays(self, expected)
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}, expected 0 or more, and below 1")

    @property
    def hidden_size(self) -> int:
        """H, the length of a hidden state."""
        return int(self.down.shape[1])

    @property
    def width(self) -> int:
        """Features between the two matrices."""
        return int(self.down.shape[0])

    @property
    def exits(self) -> int:
        """L-1."""
        return int(self.scale.shape[0])

    @property
    def parameters(self) -> int:
        """The number of stored weights."""
        return self.scale.size + self.shift.size + self.up.size + self.down.size

    def biases(self) -> NDArray[np.float64]:
        """shift up, [L-1, columns of up]: a shift of the input is a bias of the first product."""
        biases: NDArray[np.float64] = self.shift.astype(np.float64) @ self.up.astype(np.float64)
        return biases

    def apply(self, h: NDArray[Any], blocks_run: int | None = None) -> NDArray[Any]:
        """Predicts the last block's output, before the final norm.

        Args:
            h: [..., H] hidden states after some block, any float dtype.
            blocks_run: After which block, 1..L-1.

        Returns:
            [..., H], float64 for float64 input and float32 otherwise.

        Raises:
            ValueError: No exit that it serves.
        """
        if blocks_run is None or not 1 <= blocks_run <= self.exits:
            raise ValueError(f"the jump serves exits 1..{self.exits}, not {blocks_run}")
        h = h.astype(np.result_type(h.dtype, np.float32), copy=False)
        centred = h - h.mean(axis=-1, keepdims=True) if self.norm == "layer" else h
        square = np.mean(centred * centred, axis=-1, keepdims=True) + h.dtype.type(self.epsilon)
        x = centred / np.sqrt(square) * self.scale[blocks_run - 1] + self.shift[blocks_run - 1]
        inner = (gated if self.gate else activate)(x @ self.up, self.activation)
        y: NDArray[Any] = h + inner @ self.down
        return y

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuses a jump of another kind of model.

        Raises:
            ValueError: What doesn't fit.
        """
        for name, found, wanted in (
            ("exits", self.exits, spec.blocks - 1),
            ("hidden size", self.hidden_size, spec.hidden_size),
            ("norm", self.norm, spec.norm),
            ("epsilon", self.epsilon, spec.norm_epsilon),
            ("activation", self.activation, spec.activation),
            ("gate", self.gate, spec.gated),
        ):
            if found != wanted:
                raise ValueError(f"its {name} is {found}, the model's {wanted}")
