"""Which tensors of a checkpoint make up a weight of the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.models.spec import ModelSpec

# The LM head is outside the base model in every family: no prefix comes before its name.
HEAD = "lm_head.weight"
# GPT-NeoX's files have another name for it.
HEAD_NAMES = (HEAD, "embed_out.weight")


@dataclass(frozen=True)
class Source:
    """Where a weight comes from.

    A matrix is wanted as [inputs, outputs], the layout in which `x @ W` reads it.

    Attributes:
        parts: Checkpoint tensors with the outputs of each; concatenated along the outputs.
        inputs: Rows of the wanted matrix; None for a vector.
        transposed: Whether the checkpoint stores [outputs, inputs] (torch.nn.Linear).
        table: Whether it is a table with a row for each token, which as a head multiplies from
            the other side: `inputs` are tokens, and each part has its features.
        heads: How many, where queries, keys and values of one are stored before those of the next,
            and are wanted one kind after the other; 0 where they are stored so.
        offset: What is added to the tensors first, where the family's norms multiply by 1 + weight.
        scale: What the weight is times the tensors, where the family multiplies activations.
    """

    parts: tuple[tuple[str, int], ...]
    inputs: int | None = None
    transposed: bool = True
    table: bool = False
    heads: int = 0
    offset: float = 0.0
    scale: float = 1.0

    def times(self, scale: float) -> Source:
        """The same tensors, multiplied once more."""
        return replace(self, scale=self.scale * scale)

    def plus(self, offset: float) -> Source:
        """The same tensors, with something added before they are multiplied."""
        return replace(self, offset=offset)

    def by_head(self, heads: int) -> Source:
        """The same tensors, stored head by head."""
        return replace(self, heads=heads)

    def stored_shape(self, outputs: int) -> tuple[int, ...]:
        """The shape that one part must have in the checkpoint."""
        if self.inputs is None:
            return (outputs,)
        return (outputs, self.inputs) if self.transposed else (self.inputs, outputs)

    def linear_shape(self, outputs: int) -> tuple[int, int]:
        """Outputs and inputs of the layer that one part of a matrix is the weight of."""
        assert self.inputs is not None
        return (self.inputs, outputs) if self.table else (outputs, self.inputs)

    def join(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The weight as it is wanted, of the parts as the checkpoint has them.

        It has their dtype, or float32 where something is added or they are scaled.
        """
        if self.heads:
            parts = [part[by_kind(len(part), self.heads)] for part in parts]
        if self.offset:
            parts = [part.astype(np.float32) + np.float32(self.offset) for part in parts]
        if self.scale != 1:
            parts = [part.astype(np.float32) * np.float32(self.scale) for part in parts]
        if self.inputs is None:
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.transposed:
            parts = [part.T for part in parts]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)


def by_kind(rows: int, heads: int) -> NDArray[np.intp]:
    """The order in which [heads * 3 * features] is [3 * heads * features]."""
    return np.arange(rows).reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)


def vector(name: str, size: int) -> Source:
    """A vector [size], such as a norm's weight or a bias."""
    return Source(((name, size),))


def linear(inputs: int, *parts: tuple[str, int]) -> Source:
    """One or several torch.nn.Linear weights [outputs, inputs], side by side."""
    return Source(parts, inputs)


def conv1d(inputs: int, name: str, outputs: int) -> Source:
    """A GPT-2 Conv1D weight, stored as [inputs, outputs]."""
    return Source(((name, outputs),), inputs, transposed=False)


def table(name: str, rows: int, columns: int) -> Source:
    """An embedding table or LM head [rows, columns], kept as it is stored."""
    return Source(((name, columns),), rows, transposed=False, table=True)


def vectors(*parts: tuple[str, int]) -> Source:
    """Several vectors, one after the other."""
    return Source(tuple(parts))


def qk_norms(attention: str, spec: ModelSpec) -> dict[str, Source]:
    """Weights of the norms of queries and of keys, of a model that has them.

    Args:
        attention: What comes before their usual names.
        spec: The model.
    """
    return {
        f"attention.{name}.weight": vector(f"{attention}{name}.weight", features)
        for name, features in zip(("q_norm", "k_norm"), spec.qk_norm_features, strict=True)
    }


def names_of(sources: Sequence[Source]) -> list[str]:
    """Every checkpoint tensor that the sources read."""
    return [name for source in sources for name, _ in source.parts]
