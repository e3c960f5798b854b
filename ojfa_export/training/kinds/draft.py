"""A layer that drafts chains of tokens, no block of the model run: EAGLE-3's.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time
Test" (arXiv 2503.01840).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from ojfa_export.bundle.draft_shortcut import DraftShortcut, rotations
from ojfa_export.errors import CheckpointError, UsageError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.training.kinds.jump import Jump, array, parameter
from ojfa_export.training.kinds.mlp import MULTIPLE
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen, States, pick

# How much each step of a chain counts in training; later ones build on earlier ones.
WEIGHTS = 1.0, 0.8, 0.6
# Steps that are measured.
MEASURED = 4
# At first: how much the embedding counts beside the memory, in the block that the layer begins as.
SEEN = 0.5
# Of the rotations, where the model has none.
THETA = 10_000.0


class Draft(Jump):
    """See `DraftShortcut`; heads, width and epsilon are the model's own.

    Step j of the chain that begins at token p draws on the model's states of tokens up to p, and
    on the text's tokens up to p + j: it predicts what the full model says at token p + j. All
    chains of a window run side by side, each as it will when it is used: it attends to the keys
    of tokens up to p as they are at a first step, whose states the model has computed, and to the
    keys of its own steps (the "training-time test" of EAGLE-3).

    The layer begins as the model's last block where that block is Llama's, and takes the embedding
    for half as much as the memory; otherwise it begins at random.

    Args:
        frozen: The model.
        tokens: [D] int64, rising: those of a head of its own; None for the model's head.
        seed: Of what is random.
    """

    option = "vocabulary"
    unit = "draft"
    chained = True
    learning_rate = 2e-3

    def __init__(self, frozen: Frozen, tokens: Tensor | None, seed: int) -> None:
        super().__init__()
        spec, rotary = frozen.spec, frozen.rotary
        self._spec, self.depths = spec, depths(spec.blocks)
        self._theta = THETA if rotary is None else rotary.theta
        # Cosines and sines are computed once for all windows of a length, not for each on a GPU.
        self._tables: list[Tensor] = []
        self._tables_of: tuple[Any, ...] = ()
        hidden, width = spec.hidden_size, spec.intermediate_size
        queries = spec.heads * spec.head_dim
        columns = queries + 2 * spec.kv_heads * spec.head_dim
        generator = torch.Generator().manual_seed(seed)
        fuse = torch.zeros(len(self.depths) * hidden, hidden)
        fuse[-hidden:] = torch.eye(hidden)
        self.fuse = torch.nn.Parameter(fuse)
        self.embedding_norm = torch.nn.Parameter(torch.ones(hidden))
        self.state_norm = torch.nn.Parameter(torch.ones(hidden))
        self.mlp_norm = torch.nn.Parameter(torch.ones(hidden))
        self.final_norm = torch.nn.Parameter(torch.ones(hidden))
        self.qkv = parameter((2 * hidden, columns), generator)
        self.out = parameter((queries, hidden), generator)
        self.up = parameter((hidden, 2 * width), generator)
        self.down = parameter((width, hidden), generator)
        self.tokens: Tensor | None
        self.register_buffer("tokens", tokens)
        self.head: torch.nn.Parameter | None = None
        with torch.no_grad():
            if spec.norm == "rms":
                self.final_norm.copy_(frozen.norm_weight)
            if is_llamas(spec):
                self._begin_as(frozen.last_block())
            if tokens is not None:
                rows = frozen.head.weight[tokens.to(frozen.device)]
                self.head = torch.nn.Parameter(rows.float().cpu().clone())

    def _begin_as(self, block: Mapping[str, Any]) -> None:
        """Takes over a block's tensors, by the names of `graphs.block`."""
        hidden, qkv = self._spec.hidden_size, torch.from_numpy(block["attention.qkv.weight"])
        self.qkv[:hidden] = SEEN * qkv
        self.qkv[hidden:] = qkv
        for mine, name in (
            (self.state_norm, "attention.norm.weight"),
            (self.out, "attention.out.weight"),
            (self.mlp_norm, "mlp.norm.weight"),
            (self.up, "mlp.up.weight"),
            (self.down, "mlp.down.weight"),
        ):
            mine.copy_(torch.from_numpy(block[name]))

    @classmethod
    def choose(cls, asked: int | None, spec: ModelSpec) -> int | None:
        """As many tokens as were asked for, or None: the model's own head."""
        if spec.blocks < 3:
            raise CheckpointError(
                f"the model has {spec.blocks} blocks; a draft sees its states at three depths",
                hint="train a jump of another kind: --jump mlp",
            )
        if asked is not None and (asked >= spec.vocab_size or asked % MULTIPLE):
            raise UsageError(
                f"vocabulary {asked} does not suit this model: it must be a multiple of "
                f"{MULTIPLE}, and below {spec.vocab_size}, the size of its own",
                hint="leave --vocabulary out for the model's own head",
            )
        return asked

    @classmethod
    def begin(cls, frozen: Frozen, text: TrainingText, chosen: int | None, seed: int) -> Self:
        """See `Jump`."""
        return cls(frozen, None if chosen is None else frequent(text, frozen.spec, chosen), seed)

    @property
    def outputs(self) -> tuple[int, ...]:
        """See `Jump`."""
        return tuple(range(1, MEASURED + 1))

    @property
    def learned(self) -> tuple[int, ...]:
        """See `Jump`."""
        return tuple(range(1, len(WEIGHTS) + 1))

    @property
    def first(self) -> int:
        """See `Jump`."""
        return MEASURED

    @property
    def vocabulary(self) -> Tensor | None:
        """See `Jump`."""
        return self.tokens

    def weights(self, outputs: Sequence[int]) -> list[float]:
        """See `Jump`."""
        return [WEIGHTS[step - 1] / sum(WEIGHTS) for step in outputs]

    def predict(self, states: States, outputs: Sequence[int], tokens: Tensor) -> list[Tensor]:
        """See `Jump`; a chain's step j at token t began at token t - j."""
        chain = self.chain(states, outputs[-1])
        return [pick(chain[step - 1], tokens - step) for step in outputs]

    def chain(self, states: States, steps: int) -> list[Tensor]:
        """The layer's outputs [B, T, H] of each step, by the token at which its chain begins.

        A chain that goes beyond the window's end sees tokens of its beginning there.
        """
        memory = torch.cat([states.hidden[depth - 1] for depth in self.depths], -1) @ self.fuse
        memory = memory.to(self.fuse.dtype)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        made: list[Tensor] = []
        for step in range(steps):
            next_tokens = states.embedded.roll(-step - 1, 1).to(memory.dtype)
            queries = self._project(memory, next_tokens, step, keys, values)
            memory = self._finish(memory, _attend(queries, keys, values))
            made.append(memory)
        return made

    def _project(
        self, memory: Tensor, embedded: Tensor, step: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """Queries [B, heads, T, D] of a step; adds its keys and values, with heads of their own."""
        spec, norm = self._spec, self._norm
        both = [norm(embedded, self.embedding_norm), norm(memory, self.state_norm)]
        projected = torch.cat(both, -1) @ self.qkv
        by_head = projected.reshape(*projected.shape[:2], -1, spec.head_dim).transpose(1, 2)
        turned = self._rotate(by_head[:, : spec.heads + spec.kv_heads], step)
        group = spec.heads // spec.kv_heads
        keys.append(turned[:, spec.heads :].repeat_interleave(group, 1))
        values.append(by_head[:, spec.heads + spec.kv_heads :].repeat_interleave(group, 1))
        return turned[:, : spec.heads]

    def _finish(self, memory: Tensor, mixed: Tensor) -> Tensor:
        """Output projection, MLP and residuals, of mixed values [B, heads, T, D]."""
        h = memory + mixed.transpose(1, 2).flatten(2) @ self.out
        gate, up = (self._norm(h, self.mlp_norm) @ self.up).chunk(2, -1)
        y: Tensor = h + (functional.silu(gate) * up) @ self.down
        return y

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self._spec.norm_epsilon)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotates [B, heads, T, D] by positions from `start` on."""
        count, wanted = x.shape[2], (x.shape[2], x.dtype, x.device)
        if wanted != self._tables_of:
            tables = rotations(self._theta, self._spec.head_dim, 0, count + MEASURED)
            self._tables = [torch.from_numpy(each).to(x) for each in tables]
            self._tables_of = wanted
        cos, sin = (each[start : start + count] for each in self._tables)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def logits(self, frozen: Frozen, y: Tensor) -> Tensor:
        """See `Jump`: of its own norm, and its own head or the model's."""
        normed = self._norm(y, self.final_norm).to(frozen.dtype)
        if self.head is not None:
            return functional.linear(normed, self.head.to(frozen.dtype))
        logits: Tensor = frozen.head(normed)
        return logits

    def shortcut(self) -> DraftShortcut:
        """See `Jump`."""
        return DraftShortcut(
            depths=self.depths,
            fuse=array(self.fuse),
            embedding_norm=array(self.embedding_norm),
            state_norm=array(self.state_norm),
            qkv=array(self.qkv),
            out=array(self.out),
            mlp_norm=array(self.mlp_norm),
            up=array(self.up),
            down=array(self.down),
            final_norm=array(self.final_norm),
            head=None if self.head is None else array(self.head),
            tokens=None if self.tokens is None else self.tokens.cpu().numpy().astype(np.int32),
            heads=self._spec.heads,
            kv_heads=self._spec.kv_heads,
            head_dim=self._spec.head_dim,
            rope_theta=self._theta,
            epsilon=self._spec.norm_epsilon,
        )


def _attend(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Mixed values [B, heads, T, D] of the last step of all chains.

    Args:
        queries: [B, heads, T, D], by the token at which the chain begins.
        keys: Of each step so far, alike.
        values: Of each step so far, alike.
    """
    count, own = queries.shape[2], len(keys) - 1
    everything = torch.ones(count, count, dtype=torch.bool, device=queries.device)
    itself = torch.eye(count, dtype=torch.bool, device=queries.device)
    return functional.scaled_dot_product_attention(
        queries,
        torch.cat(list(keys), 2),
        torch.cat(list(values), 2),
        attn_mask=torch.cat([everything.tril(), *[itself] * own], 1),
    )


def depths(blocks: int) -> tuple[int, int, int]:
    """Blocks run before each of the states that a draft sees: early, half way, all."""
    early = max(1, blocks // 6)
    return early, max(early + 1, blocks // 2), blocks


def is_llamas(spec: ModelSpec) -> bool:
    """Whether the model's blocks compute what a draft layer does."""
    return (
        (spec.norm, spec.activation, spec.gated) == ("rms", "silu", True)
        and spec.attention_softcap is None
        and (spec.norms, spec.qk_norm, spec.parallel) == ("before", "none", False)
        and spec.rotary_dim_of(spec.blocks - 1) == spec.head_dim
        and spec.attention_scales[-1] == spec.head_dim**-0.5
    )


def frequent(text: TrainingText, spec: ModelSpec, count: int) -> Tensor:
    """The ids [count] int64, rising, of the most frequent tokens of the text to train on."""
    training, _ = text.held_out()
    times = np.bincount(text.windows[training].reshape(-1), minlength=spec.vocab_size)
    chosen = np.sort(np.argsort(-times, kind="stable")[:count])
    return torch.from_numpy(chosen.astype(np.int64))
