"""The block shortcut: a block of the model's own kind takes an exit's hidden states to the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.arrays import check_array
from ojfa_export.models.activation import activate, gated, softcapped
from ojfa_export.models.spec import SECOND, ModelSpec

# Of a block, by the names of `graphs.block`.
WEIGHTS = (
    *("attention.norm.weight", "attention.qkv.weight", "attention.out.weight"),
    *("mlp.norm.weight", "mlp.up.weight", "mlp.down.weight"),
)
# Where the family has them.
BIASES = tuple(name.replace("weight", "bias") for name in WEIGHTS)
QUERY_NORM, KEY_NORM = "attention.q_norm.weight", "attention.k_norm.weight"
AFTER_NORMS = ("attention.after_norm.weight", "mlp.after_norm.weight")
OPTIONAL = (*BIASES, QUERY_NORM, KEY_NORM, *AFTER_NORMS)


@dataclass(frozen=True, eq=False)
class BlockShortcut:
    """The jump y = block(h * scale[k] + shift[k]) after one of the exits.

    The block is of the model's own kind: norms, heads, rotation, window and activation are those
    of the model's last block. It has keys and values of its own, and sees every token up to its
    own. There is one block for all exits, or one for each.

    Attributes:
        exits: Blocks run, rising, each below L.
        scale: [exits, H] fp32.
        shift: [exits, H] fp32.
        weights: fp32, by the names of `graphs.block`; matrices [blocks, inputs, outputs], vectors
            [blocks, outputs], where blocks is 1, or the number of exits.

    Raises:
        ValueError: Arrays of another dtype, of shapes that do not fit together, or not finite;
            exits that don't rise.
    """

    exits: tuple[int, ...]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    weights: Mapping[str, NDArray[np.float32]]

    kind: Literal["block"] = "block"

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.exits))
        if not self.exits or self.exits[0] < 1 or not rising:
            raise ValueError(f"exits are {list(self.exits)}, expected rising numbers from 1 on")
        known = {*WEIGHTS, *OPTIONAL}
        unknown = sorted(self.weights.keys() - known)
        missing = [name for name in WEIGHTS if name not in self.weights]
        if unknown or missing:
            raise ValueError(f"weights are {sorted(self.weights)}, expected {', '.join(WEIGHTS)}")
        for name, array in self.weights.items():
            axes = 3 if name.endswith("weight") and "norm" not in name else 2
            if array.ndim != axes:
                raise ValueError(f"{name} has shape {list(array.shape)}, expected {axes} axes")
        if self.blocks not in (1, len(self.exits)):
            raise ValueError(f"there are {self.blocks} blocks for {len(self.exits)} exits")
        for name in ("scale", "shift"):
            check_array(name, getattr(self, name), (len(self.exits), self.hidden_size))
        for name, array in self.weights.items():
            check_array(name, array, self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, as others have it."""
        hidden, blocks = self.hidden_size, self.blocks
        if name in (QUERY_NORM, KEY_NORM):  # alone to say how wide it is
            return blocks, self.weights[name].shape[1]
        columns = {
            "attention.qkv": self.weights["attention.qkv.weight"].shape[-1],
            "mlp.up": self.weights["mlp.up.weight"].shape[-1],
        }
        rows = {
            "attention.out": self.weights["attention.out.weight"].shape[1],
            "mlp.down": self.weights["mlp.down.weight"].shape[1],
        }
        owner = name.rpartition(".")[0]
        outputs = columns.get(owner, hidden)
        if name.endswith("bias") or owner.endswith("norm"):
            return blocks, outputs
        return blocks, rows.get(owner, hidden), outputs

    def _width(self, norm: str) -> int:
        """Features of a norm; 0 without one."""
        return int(self.weights[norm].shape[1]) if norm in self.weights else 0

    @property
    def hidden_size(self) -> int:
        """H, the length of a hidden state."""
        return int(self.weights["attention.norm.weight"].shape[1])

    @property
    def blocks(self) -> int:
        """How many there are: one for all exits, or one for each."""
        return int(self.weights["attention.norm.weight"].shape[0])

    @property
    def parameters(self) -> int:
        """The number of stored weights."""
        return sum(each.size for each in (self.scale, self.shift, *self.weights.values()))

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuses blocks of another kind of model.

        Raises:
            ValueError: What doesn't fit.
        """
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        width = spec.intermediate_size
        shape = self._shape
        for name, found, wanted in (
            ("hidden size", self.hidden_size, spec.hidden_size),
            ("width of attention", shape("attention.qkv.weight")[2], queries + 2 * keys),
            ("width of its heads", shape("attention.out.weight")[1], queries),
            ("width of the MLP", shape("mlp.down.weight")[1], width),
            ("norm of queries", self._width(QUERY_NORM), spec.qk_norm_features[0]),
            ("norm of keys", self._width(KEY_NORM), spec.qk_norm_features[1]),
            ("first matrix's width", shape("mlp.up.weight")[2], 2 * width if spec.gated else width),
        ):
            if found != wanted:
                raise ValueError(f"its {name} is {found}, the model's {wanted}")
        sandwich = spec.norms == "both"
        if any((name in self.weights) != sandwich for name in AFTER_NORMS):
            there = "has no" if sandwich else "has"
            raise ValueError(f"it {there} norms after attention and MLP beside those before")
        if self.exits[-1] >= spec.blocks:
            raise ValueError(f"it serves exit {self.exits[-1]}, the model has {spec.blocks} blocks")

    def apply(
        self, h: NDArray[Any], blocks_run: int, spec: ModelSpec, rotary: tuple[NDArray[Any], ...]
    ) -> NDArray[Any]:
        """Predicts the last block's output, before the final norm, for a whole sequence.

        Args:
            h: [T, H] hidden states after some block, float32 or float64.
            blocks_run: After which block, one of the exits.
            spec: Of the model.
            rotary: Cosines and sines [T, rotary_dim / 2], of the set that the last block uses; none
                with learned positions.

        Returns:
            [T, H] in the dtype of `h`.

        Raises:
            ValueError: No exit that it serves.
        """
        if blocks_run not in self.exits:
            raise ValueError(f"the jump serves exits {list(self.exits)}, not {blocks_run}")
        index = self.exits.index(blocks_run)
        block = index if self.blocks > 1 else 0
        weights = {name: each[block].astype(h.dtype) for name, each in self.weights.items()}
        h = h * self.scale[index].astype(h.dtype) + self.shift[index].astype(h.dtype)

        def normed(x: NDArray[Any], part: str, place: Literal["before", "after"]) -> NDArray[Any]:
            if not spec.norms_are(place):
                return x
            return _norm(x, weights, f"{part}.{spec.norm_name(place)}", spec)

        qkv = _linear(normed(h, "attention", "before"), weights, "attention.qkv")
        qkv = _norm_queries_and_keys(qkv, weights, spec)
        mixed = _linear(_attention(qkv, spec, rotary), weights, "attention.out")
        attended = h + normed(mixed, "attention", "after")
        seen = normed(h if spec.parallel else attended, "mlp", "before")
        inner = _linear(seen, weights, "mlp.up")
        inner = (gated if spec.gated else activate)(inner, spec.activation)
        down = _linear(inner, weights, "mlp.down")
        y: NDArray[Any] = attended + normed(down, "mlp", "after")
        return y


@dataclass(frozen=True, eq=False)
class BlocksOnSequences:
    """A block jump as a map of rows that are sequences of one length, one after the other.

    Attributes:
        shortcut: The jump.
        spec: Of the model.
        rotary: The model's tables of cosines and sines [rows, rotary_dim/2], or None.
        length: Tokens of a sequence.
    """

    shortcut: BlockShortcut
    spec: ModelSpec
    rotary: tuple[NDArray[Any], ...] | None
    length: int

    @property
    def kind(self) -> str:
        """The jump's."""
        return self.shortcut.kind

    @property
    def parameters(self) -> int:
        """The jump's."""
        return self.shortcut.parameters

    def apply(self, h: NDArray[Any], blocks_run: int | None = None) -> NDArray[Any]:
        """Predicts the last block's output for whole sequences, from position 0 on.

        Args:
            h: [sequences * length, H].
            blocks_run: After which block.

        Returns:
            As `h`.

        Raises:
            ValueError: No exit that it serves.
        """
        if blocks_run is None:
            raise ValueError("a block jump must know its exit")
        tables, start = self.rotary or (), 0
        if tables and self.spec.rotations_of(self.spec.blocks - 1) == SECOND:
            start = len(tables[0]) // 2
        rows = tuple(table[start : start + self.length].astype(h.dtype) for table in tables)
        sequences = h.reshape(-1, self.length, h.shape[-1])
        return np.concatenate(
            [self.shortcut.apply(each, blocks_run, self.spec, rows) for each in sequences]
        )


Weights = Mapping[str, NDArray[Any]]


def _linear(x: NDArray[Any], weights: Weights, name: str) -> NDArray[Any]:
    y: NDArray[Any] = x @ weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)
    return y


def _norm(x: NDArray[Any], weights: Weights, name: str, spec: ModelSpec) -> NDArray[Any]:
    x = x - x.mean(axis=-1, keepdims=True) if spec.norm == "layer" else x
    y: NDArray[Any] = _of_unit_size(x, spec) * weights[f"{name}.weight"]
    return y + weights.get(f"{name}.bias", 0)


def _of_unit_size(x: NDArray[Any], spec: ModelSpec) -> NDArray[Any]:
    square = np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(spec.norm_epsilon)
    y: NDArray[Any] = x / np.sqrt(square)
    return y


def _norm_queries_and_keys(qkv: NDArray[Any], weights: Weights, spec: ModelSpec) -> NDArray[Any]:
    """Of [T, (heads + 2 kv_heads) head_dim], where the model has norms of them."""
    at, parts = 0, []
    for name, heads in ((QUERY_NORM, spec.heads), (KEY_NORM, spec.kv_heads)):
        part = qkv[:, at : (at := at + heads * spec.head_dim)]
        if name in weights:
            rows = _of_unit_size(part.reshape(len(qkv), -1, len(weights[name])), spec)
            part = (rows * weights[name]).reshape(part.shape)
        parts.append(part)
    return np.concatenate([*parts, qkv[:, at:]], axis=-1)


def _attention(
    qkv: NDArray[Any], spec: ModelSpec, rotary: tuple[NDArray[Any], ...]
) -> NDArray[Any]:
    """Mixes values [T, heads head_dim], of queries, keys and values side by side."""
    count = len(qkv)
    by_head = qkv.reshape(count, -1, spec.head_dim).swapaxes(0, 1)
    turned = _rotate(by_head[: spec.heads + spec.kv_heads], spec, rotary)
    values = by_head[spec.heads + spec.kv_heads :]
    group = spec.heads // spec.kv_heads
    scores = turned[: spec.heads] @ np.repeat(turned[spec.heads :], group, 0).swapaxes(1, 2)
    scores = softcapped(scores * qkv.dtype.type(spec.attention_scales[-1]), spec.attention_softcap)
    behind = np.arange(count)[:, None] - np.arange(count)
    window = spec.window_of(spec.blocks - 1) or count
    scores[:, (behind < 0) | (behind >= window)] = -np.inf
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed: NDArray[Any] = shares @ np.repeat(values, group, 0)
    return mixed.swapaxes(0, 1).reshape(count, -1)


def _rotate(x: NDArray[Any], spec: ModelSpec, rotary: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    """Rotates the leading features of [heads, T, head_dim]."""
    if not spec.rotary_dim_of(spec.blocks - 1):
        return x
    cos, sin = (each.astype(x.dtype) for each in rotary)
    first, second = np.split(x[..., : spec.rotary_dim], 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., spec.rotary_dim :]]
    return np.concatenate(turned, axis=-1)
