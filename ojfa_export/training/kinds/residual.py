"""The shared residual jump of low rank, with a gate for each exit, trained on much text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.training.kinds.jump import Pointwise, array, parameter
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen, States

# Of the hidden size, by default.
SHARE = 8
_VARIANCE_EPS = 1e-5


class Residual(Pointwise):
    """See `Shortcut`: y = h + gate[k] * ((h * scale + shift) @ down) @ up.

    `scale` and the beginning of `shift` are those of a BatchNorm over all exits' hidden states;
    `scale` stays fixed, the rest is trained. `up` begins at zero, which is the identity.

    Args:
        exits: L-1.
        hidden: H.
        rank: r.
        seed: Of `down`.
    """

    option = "rank"
    # `up` has to grow from nothing to the size of a hidden state with few features to build it
    # from, and gates from 1 to near 0 at late exits.
    faster: ClassVar[Mapping[str, float]] = {"up": 5.0, "gates": 10.0}

    def __init__(self, exits: int, hidden: int, rank: int, seed: int) -> None:
        super().__init__(exits)
        generator = torch.Generator().manual_seed(seed)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(hidden))
        self.shift = torch.nn.Parameter(torch.zeros(hidden))
        self.down = parameter((hidden, rank), generator)
        self.up = torch.nn.Parameter(torch.zeros(rank, hidden))
        self.gates = torch.nn.Parameter(torch.ones(exits))

    @classmethod
    def choose(cls, asked: int | None, spec: ModelSpec) -> int:
        """An eighth of the hidden size, or what was asked for."""
        if asked is None:
            return max(1, spec.hidden_size // SHARE)
        if asked > spec.hidden_size:
            raise UsageError(
                f"rank {asked} is larger than this model's hidden size, {spec.hidden_size}",
                hint=f"give a rank of 1 to {spec.hidden_size}, or leave --rank out",
            )
        return asked

    @classmethod
    def begin(cls, frozen: Frozen, text: TrainingText, chosen: int, seed: int) -> Self:
        """See `Jump`."""
        return cls(frozen.spec.blocks - 1, frozen.spec.hidden_size, chosen, seed)

    @classmethod
    def of(cls, shortcut: Shortcut) -> Self:
        """A jump that has been fitted.

        Args:
            shortcut: With gates.
        """
        assert shortcut.gates is not None
        made = cls(shortcut.gates.size, shortcut.hidden_size, shortcut.rank, seed=0)
        names = ("scale", "shift", "down", "up", "gates")
        made.load_state_dict({name: torch.tensor(getattr(shortcut, name)) for name in names})
        return made

    @torch.no_grad()
    def prepare(self, states: Iterable[States]) -> None:
        """Sets scale and shift by mean and variance over the exits."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for each in states:
            for hidden in each.hidden[:-1]:
                h = hidden.reshape(-1, hidden.shape[-1]).double()
                total, squares = total.to(h) + h.sum(0), squares.to(h) + h.square().sum(0)
                count += len(h)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).add(_VARIANCE_EPS).sqrt()
        self.scale.copy_(1 / deviation)
        self.shift.copy_(-mean / deviation)

    def jump(self, h: Tensor, exit: int) -> Tensor:
        """See `Pointwise`."""
        y = ((h * self.scale + self.shift) @ self.down) @ self.up
        return h + self.gates[exit - 1] * y.to(h.dtype)

    def shortcut(self) -> Shortcut:
        """See `Jump`."""
        return Shortcut(
            scale=array(self.scale),
            shift=array(self.shift),
            down=array(self.down),
            up=array(self.up),
            kind="residual",
            fitted_at=1,
            residual=True,
            gates=array(self.gates),
        )
