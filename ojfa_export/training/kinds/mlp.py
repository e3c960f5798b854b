"""One MLP of the model's own kind for all exits.

An adapter on a frozen model (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP",
arXiv 1902.00751), here as wide as the model's own MLPs, and one for all exits ("One Jump Is All
You Need", arXiv 2504.13984).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import Activation, ModelSpec
from ojfa_export.training.kinds.jump import Pointwise, array, parameter
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen

# What a GPU's matrix products want widths to be a multiple of.
MULTIPLE = 8
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class Mlp(Pointwise):
    """See `MlpShortcut`; `down` begins at zero, which is the identity.

    Args:
        spec: Of the model: norm, epsilon, activation and gate are its own.
        width: Features between the two matrices.
        seed: Of `up`.
    """

    option = "width"

    def __init__(self, spec: ModelSpec, width: int, seed: int) -> None:
        super().__init__(spec.blocks - 1)
        self._spec = spec
        hidden, exits = spec.hidden_size, spec.blocks - 1
        generator = torch.Generator().manual_seed(seed)
        self.scale = torch.nn.Parameter(torch.ones(exits, hidden))
        self.shift = torch.nn.Parameter(torch.zeros(exits, hidden))
        self.up = parameter((hidden, 2 * width if spec.gated else width), generator)
        self.down = torch.nn.Parameter(torch.zeros(width, hidden))

    @classmethod
    def choose(cls, asked: int | None, spec: ModelSpec) -> int:
        """The model's own width, or less."""
        most = spec.intermediate_size
        if asked is None:
            return most
        if asked > most or (asked % MULTIPLE and asked != most):
            raise UsageError(
                f"width {asked} does not suit this model: it must be a multiple of {MULTIPLE}, "
                f"at most {most}, the width of its own MLPs",
                hint="leave --width out for the model's own",
            )
        return asked

    @classmethod
    def begin(cls, frozen: Frozen, text: TrainingText, chosen: int, seed: int) -> Self:
        """See `Jump`."""
        return cls(frozen.spec, chosen, seed)

    def jump(self, h: Tensor, exit: int) -> Tensor:
        """See `Pointwise`."""
        shape, eps = (h.shape[-1],), self._spec.norm_epsilon
        if self._spec.norm == "layer":
            normed = functional.layer_norm(h, shape, eps=eps)
        else:
            normed = functional.rms_norm(h, shape, eps=eps)
        inner = (normed * self.scale[exit - 1] + self.shift[exit - 1]) @ self.up
        act = ACTIVATIONS[self._spec.activation]
        if self._spec.gated:
            gate, up = inner.chunk(2, -1)
            inner = act(gate) * up
        else:
            inner = act(inner)
        return h + (inner @ self.down).to(h.dtype)

    def shortcut(self) -> MlpShortcut:
        """See `Jump`."""
        return MlpShortcut(
            scale=array(self.scale),
            shift=array(self.shift),
            up=array(self.up),
            down=array(self.down),
            norm=self._spec.norm,
            epsilon=self._spec.norm_epsilon,
            activation=self._spec.activation,
            gate=self._spec.gated,
        )
