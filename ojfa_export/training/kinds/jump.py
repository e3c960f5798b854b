"""What training needs to know of a jump, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from ojfa_export.bundle.shortcut_file import AnyShortcut
from ojfa_export.models.spec import ModelSpec
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen, States


class Jump(torch.nn.Module, ABC):
    """A jump under training: what a frozen model would say, from less than all of its blocks.

    It has several outputs: one for each exit, or one for each step of a chain of drafts. Every
    output of a token is compared with what the full model says of the next one there.

    Attributes:
        option: The option that shapes it, by its name in `TrainOptions`.
        unit: What an output is, for people: "exit" or "draft".
        chained: Whether an output builds on those before it, each at the token before: then what
            counts is how far a chain agrees.
        learning_rate: The largest of AdamW.
        faster: By the name of a parameter, a factor on its learning rate.
    """

    option: ClassVar[str]
    unit: ClassVar[str] = "exit"
    chained: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
    faster: ClassVar[Mapping[str, float]] = {}

    @classmethod
    @abstractmethod
    def choose(cls, asked: Any, spec: ModelSpec) -> Any:
        """The value of its option that was asked for, else the default.

        Args:
            asked: As given; None for nothing.
            spec: Of the model.

        Raises:
            OjfaError: One that doesn't suit the model, or a model that the kind doesn't suit.
        """

    @classmethod
    @abstractmethod
    def begin(cls, frozen: Frozen, text: TrainingText, chosen: Any, seed: int) -> Self:
        """The jump before training, in fp32 on the CPU; the same seed gives the same jump.

        Args:
            frozen: The model.
            text: What it will be trained on.
            chosen: By `choose`.
            seed: Of what is random.
        """

    @property
    @abstractmethod
    def outputs(self) -> tuple[int, ...]:
        """The numbers of its outputs, which are measured: blocks run, or steps of a chain."""

    @property
    def learned(self) -> tuple[int, ...]:
        """The outputs that it is trained on."""
        return self.outputs

    @property
    def first(self) -> int:
        """First tokens of a window for which some output is missing."""
        return 0

    @property
    def vocabulary(self) -> Tensor | None:
        """Token ids [D] int64 that its logits are of; None for the model's."""
        return None

    def weights(self, outputs: Sequence[int]) -> list[float]:
        """How much each output's loss counts; 1 together."""
        return [1 / len(outputs)] * len(outputs)

    def prepare(self, states: Iterable[States]) -> None:
        """Sees some states of the text before training, for statistics that stay fixed."""

    @abstractmethod
    def predict(self, states: States, outputs: Sequence[int], tokens: Tensor) -> list[Tensor]:
        """Predicts what the last block would give.

        Args:
            states: Of a batch of windows.
            outputs: Which, rising.
            tokens: [n] int64, which tokens of the batch, counted through its rows.

        Returns:
            Of each output [n, H] fp32, before the final norm.
        """

    def logits(self, frozen: Frozen, y: Tensor) -> Tensor:
        """Logits [n, D] of predictions [n, H] fp32, in the model's dtype: of its head."""
        return frozen.logits(y)

    @abstractmethod
    def shortcut(self) -> AnyShortcut:
        """The jump as it is now, for its file."""


class Pointwise(Jump):
    """A jump from every exit that sees no token but its own, and begins as the identity.

    Args:
        exits: L-1.
    """

    def __init__(self, exits: int) -> None:
        super().__init__()
        self._exits = exits

    @property
    def outputs(self) -> tuple[int, ...]:
        """See `Jump`."""
        return tuple(range(1, self._exits + 1))

    def predict(self, states: States, outputs: Sequence[int], tokens: Tensor) -> list[Tensor]:
        """See `Jump`."""
        return [self.jump(states.at(exit, tokens), exit) for exit in outputs]

    @abstractmethod
    def jump(self, h: Tensor, exit: int) -> Tensor:
        """Hidden states [n, H] after so many blocks to the last block's output [n, H]."""


def parameter(shape: tuple[int, ...], generator: torch.Generator) -> torch.nn.Parameter:
    """A random matrix [inputs, outputs], uniform, as torch.nn.Linear's: variance 1 / (3 inputs)."""
    bound = shape[0] ** -0.5
    return torch.nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)


def array(tensor: Tensor) -> NDArray[np.float32]:
    """A copy in NumPy, fp32."""
    return tensor.detach().float().cpu().numpy().copy()
