"""The draft shortcut: one attention layer drafts chains of tokens; no block of the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.arrays import check_arrays
from ojfa_export.models.activation import gated
from ojfa_export.models.spec import ModelSpec

# Keys and values of the tokens before, [kv_heads, tokens, head_dim] each; keys are rotated.
KeysValues = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class DraftShortcut:
    """EAGLE-3's drafter (arXiv 2503.01840): a Llama-like layer with keys and values of its own.

    At position p, whose successor's token is known, the layer sees a memory s of position p and
    the embedding e of the token at p+1, and predicts the token at p+2:

        a = [rms(e) * embedding_norm, rms(s) * state_norm]
        h = s + attention(a qkv) out      causal, over all positions up to p; rotary at position p
        y = h + (silu(g) * u) down        where [g, u] = (rms(h) * mlp_norm) up
        logits = (rms(y) * final_norm) head^T

    The memory of a position that the model has run is the model's hidden states there, after three
    depths, side by side, times `fuse`. A chain goes on from the layer's own output: the next step
    has y for its memory, the drafted token's embedding, and the next position.

    Attributes:
        depths: Blocks run before each of the states that are fused, rising; L is the last
            block's output before the final norm.
        fuse: [len(depths) H, H] fp32.
        embedding_norm: [H] fp32.
        state_norm: [H] fp32.
        qkv: [2 H, (heads + 2 kv_heads) head_dim] fp32; the embedding's rows first, then the
            memory's; queries' columns, then keys', then values'.
        out: [heads head_dim, H] fp32.
        mlp_norm: [H] fp32.
        up: [H, 2 width] fp32, gate's columns first.
        down: [width, H] fp32.
        final_norm: [H] fp32.
        head: [D, H] fp32, over frequent tokens; None for the model's own LM head.
        tokens: [D] int32, their ids in the model's vocabulary, rising; None where head is.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Even: all of it rotates, in two halves.
        rope_theta: Base of the rotations' frequencies.
        epsilon: Of the norms, all of them root mean square.

    Raises:
        ValueError: Arrays of another dtype, of shapes that do not fit together, or not finite;
            numbers out of range.
    """

    depths: tuple[int, ...]
    fuse: NDArray[np.float32]
    embedding_norm: NDArray[np.float32]
    state_norm: NDArray[np.float32]
    qkv: NDArray[np.float32]
    out: NDArray[np.float32]
    mlp_norm: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    final_norm: NDArray[np.float32]
    head: NDArray[np.float32] | None
    tokens: NDArray[np.int32] | None
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    epsilon: float

    kind: Literal["draft"] = "draft"

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("fuse", "down"):
            if getattr(self, name).ndim != 2:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected two axes")
        hidden, width = self.hidden_size, self.width
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        expected: dict[str, tuple[int, ...]] = {
            "fuse": (len(self.depths) * hidden, max(1, hidden)),
            **dict.fromkeys(("embedding_norm", "state_norm", "mlp_norm", "final_norm"), (hidden,)),
            "qkv": (2 * hidden, queries + 2 * keys),
            "out": (queries, hidden),
            "up": (hidden, 2 * width),
            "down": (max(1, width), hidden),
        }
        if self.head is not None:
            expected["head"] = (max(1, len(self.head)), hidden)
        check_arrays(self, expected)
        self._check_tokens()

    def _check_numbers(self) -> None:
        if not self.depths or min(self.depths) < 1 or not _rises(self.depths):
            raise ValueError(f"depths are {list(self.depths)}, expected rising numbers from 1 on")
        if min(self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads can't share {self.kv_heads} of keys and values")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number")
        if not 0 < self.rope_theta < np.inf:
            raise ValueError(f"rope_theta is {self.rope_theta}, expected a positive number")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}, expected 0 or more, and below 1")

    def _check_tokens(self) -> None:
        if (self.head is None) != (self.tokens is None):
            raise ValueError("head and tokens go together: one of them is missing")
        if self.head is None or self.tokens is None:
            return
        if self.tokens.dtype != np.int32 or self.tokens.shape != self.head.shape[:1]:
            raise ValueError(
                f"tokens are {self.tokens.dtype} {list(self.tokens.shape)}, expected int32 "
                f"[{len(self.head)}]"
            )
        if self.tokens[0] < 0 or not (np.diff(self.tokens) > 0).all():
            raise ValueError("tokens must rise, from 0 on")

    @property
    def hidden_size(self) -> int:
        """H, the length of a hidden state."""
        return int(self.fuse.shape[1])

    @property
    def width(self) -> int:
        """Features between the MLP's matrices."""
        return int(self.down.shape[0])

    @property
    def parameters(self) -> int:
        """The number of stored weights; token ids are none."""
        names = ("fuse", "embedding_norm", "state_norm", "qkv", "out", "mlp_norm", "up", "down")
        arrays = [*(getattr(self, name) for name in names), self.final_norm, self.head]
        return sum(array.size for array in arrays if array is not None)

    def spec_within(self, model: ModelSpec) -> ModelSpec:
        """The layer as a model of one block, over its own tokens.

        Its logits have no softcap where the model's have one: it was trained without.
        """
        return ModelSpec(
            family="draft",
            blocks=1,
            hidden_size=self.hidden_size,
            vocab_size=model.vocab_size if self.head is None else len(self.head),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.width,
            attention_scales=(self.head_dim**-0.5,),
            window=None,
            rotary_dim=self.head_dim,
            rotary_switch=None,
            activation="silu",
            gated=True,
            norm="rms",
            norm_epsilon=self.epsilon,
            max_positions=model.max_positions,
            tied_head=False,
            eos_token_ids=(),
        )

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuses a layer of another kind of model.

        Raises:
            ValueError: What doesn't fit.
        """
        if self.hidden_size != spec.hidden_size:
            raise ValueError(
                f"its hidden size is {self.hidden_size}, the model's {spec.hidden_size}"
            )
        if self.depths[-1] > spec.blocks:
            raise ValueError(
                f"it sees states after {self.depths[-1]} blocks, the model has {spec.blocks}"
            )
        if self.tokens is not None and self.tokens[-1] >= spec.vocab_size:
            raise ValueError(
                f"it drafts token {self.tokens[-1]}, the model's vocabulary has {spec.vocab_size}"
            )

    def memory(self, states: NDArray[Any]) -> NDArray[Any]:
        """What the layer sees of positions that the model has run.

        Args:
            states: [..., len(depths) H], the hidden states after each of the depths, side by side.

        Returns:
            [..., H] in the dtype of the states.
        """
        result: NDArray[Any] = states @ self.fuse.astype(states.dtype)
        return result

    def apply(
        self, memory: NDArray[Any], embeddings: NDArray[Any], past: KeysValues | None = None
    ) -> tuple[NDArray[Any], KeysValues]:
        """Runs the layer on consecutive positions of one sequence.

        Args:
            memory: [T, H], float32 or float64: of the model's states, or of a chain the output
                of the step before.
            embeddings: [T, H] of each position's next token.
            past: Of the positions before; None where the first position is 0.

        Returns:
            Outputs [T, H], and keys and values of all positions so far, in memory's dtype.
        """
        dtype, norm = memory.dtype, self._norm
        both = [norm(embeddings.astype(dtype), self.embedding_norm), norm(memory, self.state_norm)]
        projected = np.concatenate(both, axis=-1) @ self.qkv.astype(dtype)
        mixed, seen = self._attention(projected, past)
        h = memory + mixed @ self.out.astype(dtype)
        inner = gated(norm(h, self.mlp_norm) @ self.up.astype(dtype), "silu")
        return h + inner @ self.down.astype(dtype), seen

    def logits(self, outputs: NDArray[Any], model_head: NDArray[Any] | None = None) -> NDArray[Any]:
        """What the layer thinks of the token after the next.

        Args:
            outputs: [..., H] of the layer.
            model_head: The model's LM head [V, H], for a layer that has none.

        Returns:
            [..., D] over `tokens`, or [..., V] without a head.
        """
        head = model_head if self.head is None else self.head
        assert head is not None
        result: NDArray[Any] = self._norm(outputs, self.final_norm) @ head.astype(outputs.dtype).T
        return result

    def _norm(self, x: NDArray[Any], weight: NDArray[np.float32]) -> NDArray[Any]:
        square = np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(self.epsilon)
        result: NDArray[Any] = x / np.sqrt(square) * weight.astype(x.dtype)
        return result

    def _attention(
        self, projected: NDArray[Any], past: KeysValues | None
    ) -> tuple[NDArray[Any], KeysValues]:
        """Mixes values [T, heads head_dim], of queries, keys and values side by side."""
        count = len(projected)
        by_head = projected.reshape(count, -1, self.head_dim).swapaxes(0, 1)
        start = 0 if past is None else past[0].shape[1]
        turned = self._rotate(by_head[: self.heads + self.kv_heads], start)
        keys, values = turned[self.heads :], by_head[self.heads + self.kv_heads :]
        if past is not None:
            keys = np.concatenate([past[0], keys], axis=1)
            values = np.concatenate([past[1], values], axis=1)
        group = self.heads // self.kv_heads
        scores = turned[: self.heads] @ np.repeat(keys, group, 0).swapaxes(1, 2)
        scores = scores * projected.dtype.type(self.head_dim**-0.5)
        ahead = np.arange(start + count) > np.arange(start, start + count)[:, None]
        scores[:, ahead] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ np.repeat(values, group, 0)).swapaxes(0, 1).reshape(count, -1)
        return mixed, (keys, values)

    def _rotate(self, x: NDArray[Any], start: int) -> NDArray[Any]:
        """Rotates [heads, T, head_dim] by positions from `start` on."""
        cos, sin = rotations(self.rope_theta, self.head_dim, start, x.shape[1])
        first, second = np.split(x, 2, axis=-1)
        cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotations(
    theta: float, head_dim: int, start: int, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosines and sines [count, head_dim / 2] of positions from `start` on.

    Args:
        theta: Base of the frequencies.
        head_dim: Features that rotate.
        start: First position.
        count: Positions.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(start, start + count)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def _rises(numbers: tuple[int, ...]) -> bool:
    return all(a < b for a, b in pairwise(numbers))
