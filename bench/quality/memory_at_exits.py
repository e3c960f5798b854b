"""Whether an exit agrees more often where its jump also sees the token before: a trial.

    python -m bench.quality.memory_at_exits CHECKPOINT --self-text --tokens 2M \
        --kind mlp:4 --kind memory:4 --kind own:4 --statistics DIR --out FILE

The options and figures are those of `bench.quality.trained`; the two more kinds are an MLP with a
second matrix for a memory of the token before:

- `memory`: its states after a sixth, a half and all of the blocks, as a draft layer sees them. They
  are there only where that token has run at full depth, so this is the most that can be had.
- `own`: its state after as many blocks as the exit's, which is there wherever it left.

No bundle runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.quality import trained
from ojfa_export.models.spec import ModelSpec
from ojfa_export.training.kinds import KINDS
from ojfa_export.training.kinds.draft import depths
from ojfa_export.training.kinds.jump import parameter
from ojfa_export.training.kinds.mlp import ACTIVATIONS, Mlp
from ojfa_export.writing.frozen import States


class Own(Mlp):
    """An MLP that also sees the state of the token before at the same exit.

    Args:
        spec: Of the model, gated and with root mean square norms.
        width: Features between the two matrices.
        seed: Of what is random.
    """

    def __init__(self, spec: ModelSpec, width: int, seed: int) -> None:
        super().__init__(spec, width, seed)
        hidden = spec.hidden_size
        generator = torch.Generator().manual_seed(seed + 1)
        self.seen = parameter((self._memories * hidden, hidden), generator)
        self.memory = torch.nn.Parameter(torch.ones(spec.blocks - 1, hidden))
        self.up_memory = parameter((hidden, 2 * width), generator)

    _memories = 1

    @property
    def first(self) -> int:
        """The first token of a window has none before it."""
        return 1

    def before(self, states: States, exit: int, tokens: Tensor) -> Tensor:
        """What is remembered of the tokens before: [n, memories H] fp32."""
        return states.at(exit, tokens - 1)

    def predict(self, states: States, outputs: Sequence[int], tokens: Tensor) -> list[Tensor]:
        """See `Jump`."""
        found = []
        for exit in outputs:
            h = states.at(exit, tokens)
            found.append(self._jump(h, self.before(states, exit, tokens), exit))
        return found

    def _jump(self, h: Tensor, before: Tensor, exit: int) -> Tensor:
        shape, eps = (h.shape[-1],), self._spec.norm_epsilon
        normed = functional.rms_norm(h, shape, eps=eps)
        remembered = functional.rms_norm((before @ self.seen).float(), shape, eps=eps)
        inner = (normed * self.scale[exit - 1] + self.shift[exit - 1]) @ self.up
        inner = inner + (remembered * self.memory[exit - 1]) @ self.up_memory
        gate, up = inner.chunk(2, -1)
        inner = ACTIVATIONS[self._spec.activation](gate) * up
        return h + (inner @ self.down).to(h.dtype)

    def shortcut(self) -> Any:
        """Only how large it is: there is no file of it."""
        return SimpleNamespace(parameters=sum(each.numel() for each in self.parameters()))


class Memory(Own):
    """The same with the states that the token before has at full depth."""

    _memories = 3

    def before(self, states: States, exit: int, tokens: Tensor) -> Tensor:
        """See `Own`."""
        there = [states.at(depth, tokens - 1) for depth in depths(self._spec.blocks)]
        return torch.cat(there, -1)


def main() -> None:
    """Trains, measures, records and draws, as `bench.quality.trained` does."""
    KINDS.update({"memory": Memory, "own": Own})
    trained.COLOURS.update({"memory": "#CC79A7", "own": "#56B4E9"})
    trained.main()


if __name__ == "__main__":
    main()
