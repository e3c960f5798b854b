"""Distils a shared residual jump: its exits learn the full model's distribution, all at once.

Needs torch; the LM head is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.gates import close_gates
from ojfa_export.shortcuts.residual import HiddenByDepth
from ojfa_export.shortcuts.sample import within
from ojfa_export.system.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

# Half as many end about 0.05 nats higher.
STEPS = 400
# Logits of a step at most: of the exits of its tokens, and one full-model row for every token.
LOGITS_AT_ONCE = 1 << 22
EXITS_PER_TOKEN = 4
PAIRS = 64, 512  # of a token and an exit, in a step
# Logits of a validation, and tokens: a vocabulary of 49,152 seen from 29 exits gets 140. States of
# one training are compared on the same tokens, of which few are enough.
VALIDATED_LOGITS = 200_000_000
VALIDATED_TOKENS = 128, 512
VALIDATED_EVERY = 50
# Checks in a row without a gain, after which there is no more to be had.
PATIENCE = 3
# Of a parameter's own root mean square, per step of Adam.
LEARNING_RATE = 0.03


@dataclass(frozen=True)
class Distilled:
    """A distilled jump.

    Attributes:
        shortcut: The jump.
        steps: Steps taken.
        loss_before: Mean KL(full || exit) over exits on the validation tokens, nats.
        loss_after: The same of the result, before gates were closed.
        closed: Exits whose gate is 0, as the identity is as good there.
    """

    shortcut: Shortcut
    steps: int
    loss_before: float
    loss_after: float
    closed: tuple[int, ...]


def split_rows(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows 0..count to train on and to validate on: an eighth, in stretches of text."""
    rows = np.arange(count)
    stretch = max(1, min(512, count // 32))
    aside = rows // stretch % 8 == 7
    return rows[~aside], rows[aside]


def distil(
    shortcut: Shortcut,
    hidden: HiddenByDepth,
    rows: int,
    head: LanguageHead,
    *,
    steps: int = STEPS,
    progress: Progress = SILENT,
) -> Distilled:
    """Trains a residual jump with gates on KL(full model || exit), the mean over exits.

    Adam with a cosine rate on minibatches of random tokens, each seen from a few random exits. The
    state with the least loss on validation tokens is kept, the beginning included, so that the
    result is never worse there. The same rows give the same jump on the same machine.

    Args:
        shortcut: With gates; where to begin.
        hidden: Hidden states [n, H] at depths 1..L; memory maps will do.
        rows: The first so many rows are for this; an eighth of them validates.
        head: The model's own norm and head; held in fp32 meanwhile.
        steps: At most.
        progress: Shows steps.
    """
    if shortcut.gates is None:
        raise ValueError("only a jump with gates can be distilled")
    blocks = shortcut.gates.size + 1
    training, validation = split_rows(rows)
    vocabulary = head.weight.shape[0]
    count = within(VALIDATED_TOKENS, VALIDATED_LOGITS // ((blocks - 1) * vocabulary))
    sample = validation[:: max(1, len(validation) // count)]
    model = _Student(shortcut, head)
    kept, taken, before, best = _train(
        model, shortcut, hidden, sample, _batches(training, blocks, head, steps), steps, progress
    )
    finished, closed = close_gates(kept, hidden, validation, head, progress)
    return Distilled(replace(finished, kind="residual"), taken, before, best, closed)


def _train(
    model: _Student,
    shortcut: Shortcut,
    hidden: HiddenByDepth,
    sample: NDArray[np.int64],
    batches: Iterable[tuple[NDArray[np.int64], list[int]]],
    steps: int,
    progress: Progress,
) -> tuple[Shortcut, int, float, float]:
    """Trains until a few validations in a row bring nothing.

    Returns:
        The best state, the steps taken, and the loss on `sample` before and of that state.
    """
    optimiser, schedule = _optimiser(model, steps)
    before = best = model.loss(hidden, sample)
    kept, stale, step = shortcut, 0, 0
    with progress.task("calibrating: distilling", steps, "steps") as task:
        for step, (tokens, exits) in enumerate(batches, start=1):
            optimiser.zero_grad()
            full = model.full(hidden, tokens)
            model.divergence(hidden, tokens, exits, full).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            task.advance()
            if step % VALIDATED_EVERY and step < steps:
                continue
            loss = model.loss(hidden, sample)
            stale = 0 if loss < best else stale + 1
            if loss < best:
                best, kept = loss, model.shortcut(shortcut)
            if stale == PATIENCE:
                break
        task.advance(steps - step)
    return kept, step, before, best


def _optimiser(
    model: _Student, steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam, at rates that suit each tensor, warmed up and then falling along a cosine."""
    import torch

    optimiser = torch.optim.Adam(
        [{"params": [each], "lr": LEARNING_RATE * _scale(each)} for each in model.parameters]
    )
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    return optimiser, schedule


class _Student:
    """The jump's tensors, and the frozen head.

    Args:
        shortcut: With gates.
        head: The model's own norm and head.
    """

    def __init__(self, shortcut: Shortcut, head: LanguageHead) -> None:
        import torch

        assert shortcut.gates is not None
        self._blocks = shortcut.gates.size + 1

        def trained(array: NDArray[np.float32] | None) -> torch.Tensor:
            return torch.tensor(array, requires_grad=True)

        self._scale = torch.tensor(shortcut.scale)
        self._shift, self._down = trained(shortcut.shift), trained(shortcut.down)
        self._up, self._gates = trained(shortcut.up), trained(shortcut.gates)
        self._weight = torch.tensor(np.asarray(head.weight, np.float32))
        self._bias = None if head.bias is None else torch.tensor(head.bias.astype(np.float32))
        self._norm, self._softcap = head.norm, head.softcap
        self._norm_weight = torch.tensor(np.asarray(head.norm.weight, np.float32))
        bias = head.norm.bias
        self._norm_bias = None if bias is None else torch.tensor(np.asarray(bias, np.float32))

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is trained."""
        return [self._shift, self._down, self._up, self._gates]

    def shortcut(self, like: Shortcut) -> Shortcut:
        """The jump as it is now."""
        shift, down, up, gates = (each.detach().numpy().copy() for each in self.parameters)
        return replace(like, shift=shift, down=down, up=up, gates=gates)

    def loss(self, hidden: HiddenByDepth, tokens: NDArray[np.int64]) -> float:
        """Mean divergence over tokens and all exits."""
        import torch

        at_once = max(1, LOGITS_AT_ONCE // self._weight.shape[0])
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(tokens), at_once):
                part = tokens[start : start + at_once]
                full = self.full(hidden, part)
                for exit in range(1, self._blocks):
                    total += float(self.divergence(hidden, part, [exit], full).sum())
        return total / (len(tokens) * (self._blocks - 1))

    def full(self, hidden: HiddenByDepth, tokens: NDArray[np.int64]) -> torch.Tensor:
        """Log-probabilities of the full model, [tokens, V]."""
        import torch

        with torch.no_grad():
            return torch.log_softmax(self._logits(_rows(hidden, self._blocks, tokens)), -1)

    def divergence(
        self,
        hidden: HiddenByDepth,
        tokens: NDArray[np.int64],
        exits: list[int],
        full: torch.Tensor,
    ) -> torch.Tensor:
        """KL(full || exit), [exits, tokens], nats."""
        import torch

        h = torch.stack([_rows(hidden, exit, tokens) for exit in exits])
        gates = self._gates[[exit - 1 for exit in exits], None, None]
        y = h + gates * (((h * self._scale + self._shift) @ self._down) @ self._up)
        own = torch.log_softmax(self._logits(y), -1)
        return (full.exp() * (full - own)).sum(-1)

    def _logits(self, y: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn import functional

        shape = (y.shape[-1],)
        if self._norm.kind == "layer":
            normed = functional.layer_norm(
                y, shape, self._norm_weight, self._norm_bias, self._norm.eps
            )
        else:
            mean_square = y.square().mean(-1, keepdim=True)
            normed = y * torch.rsqrt(mean_square + self._norm.eps) * self._norm_weight
        logits = functional.linear(normed, self._weight, self._bias)
        cap = self._softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _batches(
    training: NDArray[np.int64], blocks: int, head: LanguageHead, steps: int
) -> Iterator[tuple[NDArray[np.int64], list[int]]]:
    """For each step: tokens, and the exits that they are seen from.

    Exit k is drawn with a probability that falls as 1 / sqrt(k): early exits have more to learn.
    """
    rng = np.random.default_rng(0)
    weights = np.arange(1, blocks) ** -0.5
    weights /= weights.sum()
    exits = min(EXITS_PER_TOKEN, blocks - 1)
    least, most = PAIRS
    pairs = max(least, min(LOGITS_AT_ONCE // head.weight.shape[0], most))
    for _ in range(steps):
        tokens = np.sort(rng.choice(training, max(1, pairs // exits)))
        yield (
            tokens,
            sorted(rng.choice(np.arange(1, blocks), exits, replace=False, p=weights).tolist()),
        )


def _rows(hidden: HiddenByDepth, depth: int, tokens: NDArray[np.int64]) -> torch.Tensor:
    import torch

    return torch.tensor(np.asarray(hidden(depth)[tokens], np.float32))


def _scale(tensor: torch.Tensor) -> float:
    """Root mean square, not less than what lets a tensor of zeros move."""
    return max(float(tensor.detach().square().mean().sqrt()), 1e-3)
