"""A transformer block of the model's own kind: one for all exits, or one for each of a few.

It sees every token before its own at the same exit, which no other kind does. What an exit has of
its own beside is a scale and a shift of its hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.training.kinds.jump import Jump, array
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen, States, output_of, pick


class Block(Jump):
    """See `BlockShortcut`; blocks begin as the model's last one.

    They are transformers' own, of any family: what the model gave its last block beside hidden
    states, the mask and the positions, they are given too.

    Args:
        frozen: The model.
        exits: Those with a block of their own, rising; None for one block for all of the model's.
    """

    option = "exits"
    learning_rate = 6e-4

    def __init__(self, frozen: Frozen, exits: tuple[int, ...] | None) -> None:
        super().__init__()
        spec = frozen.spec
        self._exits = exits or tuple(range(1, spec.blocks))
        blocks = 1 if exits is None else len(exits)
        layers = [copy.deepcopy(frozen.last_layer).float().cpu() for _ in range(blocks)]
        self.layers = torch.nn.ModuleList(layers).requires_grad_(True)
        self.scale = torch.nn.Parameter(torch.ones(len(self._exits), spec.hidden_size))
        self.shift = torch.nn.Parameter(torch.zeros(len(self._exits), spec.hidden_size))
        checkpoint, index = frozen.checkpoint, spec.blocks - 1
        self._sources = checkpoint.family.block(checkpoint.config, spec, index)

    @classmethod
    def choose(cls, asked: tuple[int, ...] | None, spec: ModelSpec) -> tuple[int, ...] | None:
        """The exits that were asked for, or None: one block for all."""
        if asked is None:
            return None
        most = spec.blocks - 1
        if not asked or list(asked) != sorted(set(asked)) or asked[-1] > most:
            raise UsageError(
                f"exits {','.join(map(str, asked))} do not suit this model: they must rise, "
                f"from 1 to {most} at most",
                hint="leave --exits out for one block for all exits",
            )
        return asked

    @classmethod
    def begin(
        cls, frozen: Frozen, text: TrainingText, chosen: tuple[int, ...] | None, seed: int
    ) -> Self:
        """See `Jump`."""
        return cls(frozen, chosen)

    @property
    def outputs(self) -> tuple[int, ...]:
        """See `Jump`."""
        return self._exits

    def predict(self, states: States, outputs: Sequence[int], tokens: Tensor) -> list[Tensor]:
        """See `Jump`; whole windows run, as every token may see those before it."""
        return [pick(self.jump(states, exit), tokens) for exit in outputs]

    def jump(self, states: States, exit: int) -> Tensor:
        """Hidden states of whole windows at an exit to the last block's output [B, T, H]."""
        index = self._exits.index(exit)
        h = states.hidden[exit - 1].to(self.scale.dtype) * self.scale[index] + self.shift[index]
        layer = self.layers[index if len(self.layers) > 1 else 0]
        arguments, named = states.beside
        return output_of(layer(h, *arguments, **named))

    def shortcut(self) -> BlockShortcut:
        """See `Jump`; the blocks' tensors as the checkpoint's are read."""
        layers = [layer.state_dict() for layer in self.layers]
        return BlockShortcut(
            exits=self._exits,
            scale=array(self.scale),
            shift=array(self.shift),
            weights={
                name: np.stack(
                    [
                        source.join([array(layer[inside(part)]) for part, _ in source.parts])
                        for layer in layers
                    ]
                )
                for name, source in self._sources.items()
            },
        )


def inside(tensor: str) -> str:
    """The name of a tensor inside of its block: "mlp.up.weight" of "layers.3.mlp.up.weight"."""
    return tensor.split(".", 2)[2]
