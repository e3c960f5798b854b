"""How far exits are from the full model: what is trained on, and what is measured.

The loss is KL(full || exit), the distillation of Hinton et al. (arXiv 1503.02531) with the full
model as the teacher of its own exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ojfa_export.training.frozen import Frozen, States
from ojfa_export.training.kinds.jump import Jump


@dataclass(frozen=True)
class Figures:
    """What exits 1..L-1 say on held-out text.

    Attributes:
        loss: KL(full || exit) of each, nats a token.
        agreement: Share of tokens at which each chooses the full model's token.
    """

    loss: tuple[float, ...]
    agreement: tuple[float, ...]

    @property
    def mean_loss(self) -> float:
        """Over the exits."""
        return sum(self.loss) / len(self.loss)

    @property
    def mean_agreement(self) -> float:
        """Over the exits."""
        return sum(self.agreement) / len(self.agreement)


def _products(frozen: Frozen) -> torch.autocast:
    """Products in the precision of the model's own."""
    half = frozen.dtype != torch.float32
    return torch.autocast(frozen.device.type, dtype=torch.bfloat16, enabled=half)


def learn(
    frozen: Frozen,
    jump: Jump,
    states: States,
    exits: Sequence[int],
    tokens: Tensor,
    weight: float,
    logits_rows: int,
) -> float:
    """Adds the gradient of `weight` times the summed divergence to the jump's parameters.

    The jump runs once an exit, the head in pieces: logits of a piece are gone before the next.

    Args:
        frozen: The model.
        jump: Being trained.
        states: Of a batch of windows.
        exits: To learn from.
        tokens: [n] int64, of the batch, counted through its rows.
        weight: Of each pair of an exit and a token.
        logits_rows: Of a piece.

    Returns:
        The weighted sum.
    """
    with _products(frozen):
        predicted = [jump.predict(states, exit, tokens) for exit in exits]
    leaves = [y.detach().requires_grad_() for y in predicted]
    total = torch.zeros((), device=frozen.device)
    for rows, full in _full(frozen, states, tokens, logits_rows):
        for leaf in leaves:
            part = weight * _divergence(full, frozen.log_probs(leaf[rows])).sum()
            part.backward()  # type: ignore[no-untyped-call]
            total += part.detach()
    for y, leaf in zip(predicted, leaves, strict=True):
        y.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return float(total)


@torch.no_grad()
def measure(
    frozen: Frozen,
    jump: Jump | None,
    windows: Tensor,
    positions: Tensor,
    rows_at_once: int,
    logits_rows: int,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Figures:
    """Loss and agreement at every exit.

    Args:
        frozen: The model.
        jump: None for none: the hidden states as they are.
        windows: [n, T] int64 of held-out text.
        positions: [n, p] int64, which tokens of each window count.
        rows_at_once: Windows of a pass.
        logits_rows: Of a piece.
        tell: Called with how many more tokens have been measured.
    """
    loss = torch.zeros(frozen.exits, dtype=torch.float64)
    agree = torch.zeros(frozen.exits, dtype=torch.float64)
    for start in range(0, len(windows), rows_at_once):
        part = windows[start : start + rows_at_once]
        states = frozen.states(part)
        first = torch.arange(len(part))[:, None] * part.shape[1]
        tokens = (first + positions[start : start + rows_at_once]).flatten().to(frozen.device)
        for rows, full in _full(frozen, states, tokens, logits_rows):
            top = full.argmax(-1)
            for exit in range(1, frozen.exits + 1):
                with _products(frozen):
                    y = (
                        states.at(exit, tokens[rows])
                        if jump is None
                        else jump.predict(states, exit, tokens[rows])
                    )
                own = frozen.log_probs(y)
                loss[exit - 1] += float(_divergence(full, own).sum(dtype=torch.float64))
                agree[exit - 1] += int((own.argmax(-1) == top).sum())
        tell(tokens.numel())
    count = positions.numel()
    return Figures(tuple((loss / count).tolist()), tuple((agree / count).tolist()))


def _full(
    frozen: Frozen, states: States, tokens: Tensor, logits_rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the tokens, and the full model's log probabilities of each [m, V]."""
    last = states.last.reshape(-1, states.last.shape[-1])
    for start in range(0, len(tokens), logits_rows):
        rows = slice(start, start + logits_rows)
        yield rows, frozen.full_log_probs(last[tokens[rows]])


def _divergence(full: Tensor, own: Tensor) -> Tensor:
    """KL(full || own) of each row [m], nats, of log probabilities [m, V]."""
    return (full.exp() * (full - own)).sum(-1)
