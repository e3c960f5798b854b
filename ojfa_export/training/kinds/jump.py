"""What training needs to know of a jump, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ojfa_export.bundle.shortcut_file import AnyShortcut
from ojfa_export.models.spec import ModelSpec
from ojfa_export.training.frozen import States


class Jump(torch.nn.Module, ABC):
    """A jump under training: from any exit's hidden states to the last block's output.

    It begins as the identity, so that training starts from what no jump at all gives.

    Attributes:
        size_name: The option that sets its size: "width" or "rank".
        learning_rate: The largest of AdamW.
        faster: By the name of a parameter, a factor on its learning rate.
    """

    size_name: ClassVar[str]
    learning_rate: ClassVar[float] = 1e-3
    faster: ClassVar[Mapping[str, float]] = {}

    @classmethod
    @abstractmethod
    def choose_size(cls, asked: int | None, spec: ModelSpec) -> int:
        """The size that was asked for, else the default.

        Raises:
            UsageError: One that doesn't suit the model.
        """

    @classmethod
    @abstractmethod
    def begin(cls, spec: ModelSpec, size: int, seed: int) -> Self:
        """The identity, in fp32 on the CPU; the same seed gives the same jump."""

    def prepare(self, states: Iterable[States]) -> None:
        """Sees some states of the text before training, for statistics that stay fixed."""

    @abstractmethod
    def predict(self, states: States, exit: int, tokens: Tensor) -> Tensor:
        """Predicts the last block's output.

        Args:
            states: Of a batch of windows.
            exit: Blocks run, 1..L-1.
            tokens: [n] int64, which tokens of the batch, counted through its rows.

        Returns:
            [n, H] fp32, before the final norm.
        """

    @abstractmethod
    def shortcut(self) -> AnyShortcut:
        """The jump as it is now, for its file."""


class Pointwise(Jump):
    """A jump that sees no token but its own."""

    def predict(self, states: States, exit: int, tokens: Tensor) -> Tensor:
        """See `Jump`."""
        return self.jump(states.at(exit, tokens), exit)

    @abstractmethod
    def jump(self, h: Tensor, exit: int) -> Tensor:
        """Hidden states [n, H] after so many blocks to the last block's output [n, H]."""


def parameter(shape: tuple[int, ...], generator: torch.Generator) -> torch.nn.Parameter:
    """A random matrix [inputs, outputs], uniform, as torch.nn.Linear's: variance 1 / (3 inputs)."""
    bound = shape[0] ** -0.5
    return torch.nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
