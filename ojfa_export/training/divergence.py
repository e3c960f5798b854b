"""How far a jump's outputs are from the full model: what is trained on, and what is measured.

The loss is KL(full || output), the distillation of Hinton et al. (arXiv 1503.02531) with the full
model as the teacher of its own exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ojfa_export.training.kinds.jump import Jump
from ojfa_export.writing.frozen import Frozen, States


@dataclass(frozen=True)
class Figures:
    """What a jump's outputs say on held-out text, one after the other.

    Attributes:
        loss: KL(full || output) of each, nats a token.
        agreement: Share of tokens at which each chooses the full model's token.
        chain: Where outputs are steps of a chain, the share of chains of which this step and all
            before it choose the full model's token.
    """

    loss: tuple[float, ...]
    agreement: tuple[float, ...]
    chain: tuple[float, ...] | None = None

    @property
    def mean_loss(self) -> float:
        """Over the outputs."""
        return sum(self.loss) / len(self.loss)

    @property
    def mean_agreement(self) -> float:
        """Over the outputs."""
        return sum(self.agreement) / len(self.agreement)


def _products(frozen: Frozen) -> torch.autocast:
    """Products in the precision of the model's own."""
    half = frozen.dtype != torch.float32
    return torch.autocast(frozen.device.type, dtype=torch.bfloat16, enabled=half)


def learn(
    frozen: Frozen,
    jump: Jump,
    states: States,
    outputs: Sequence[int],
    tokens: Tensor,
    weight: float,
    logits_rows: int,
) -> float:
    """Adds the gradient of `weight` times the summed divergence to the jump's parameters.

    The jump runs once, the head in pieces: logits of a piece are gone before the next.

    Args:
        frozen: The model.
        jump: Being trained.
        states: Of a batch of windows.
        outputs: To learn from.
        tokens: [n] int64, of the batch, counted through its rows.
        weight: Of each token; a jump divides it among its outputs.
        logits_rows: Of a piece.

    Returns:
        The weighted sum.
    """
    with _products(frozen):
        predicted = jump.predict(states, outputs, tokens)
    leaves = [y.detach().requires_grad_() for y in predicted]
    shares = [weight * share for share in jump.weights(outputs)]
    total = torch.zeros((), device=frozen.device)
    for rows, full in _full(frozen, states, tokens, logits_rows):
        full = _among(jump.vocabulary, full)
        target = full.exp()
        for leaf, share in zip(leaves, shares, strict=True):
            logits = jump.logits(frozen, leaf[rows])
            own = logits.detach().float().log_softmax(-1)
            total += share * _divergence(full, own).sum()
            # The gradient of the divergence by the logits: less memory than by autograd.
            gradient = own.exp_().sub_(target).mul_(share)
            logits.backward(gradient.to(logits.dtype))  # type: ignore[no-untyped-call]
    torch.autograd.backward(predicted, [leaf.grad for leaf in leaves])
    return float(total)


@torch.no_grad()
def measure(
    frozen: Frozen,
    jump: Jump,
    windows: Tensor,
    positions: Tensor,
    rows_at_once: int,
    logits_rows: int,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Figures:
    """Loss and agreement of every output.

    Args:
        frozen: The model.
        jump: To be measured.
        windows: [n, T] int64 of held-out text.
        positions: [n, p] int64, which tokens of each window count; one after the other for a jump
            whose outputs are a chain.
        rows_at_once: Windows of a pass.
        logits_rows: Of a piece.
        tell: Called with how many more tokens have been measured.
    """
    loss = torch.zeros(len(jump.outputs), dtype=torch.float64)
    agree: list[Tensor] = []
    for start in range(0, len(windows), rows_at_once):
        part = windows[start : start + rows_at_once]
        states = frozen.states(part)
        first = torch.arange(len(part))[:, None] * part.shape[1]
        tokens = (first + positions[start : start + rows_at_once]).flatten().to(frozen.device)
        with _products(frozen):
            predicted = jump.predict(states, jump.outputs, tokens)
        for rows, full in _full(frozen, states, tokens, logits_rows):
            chosen, same = full.argmax(-1), []
            full = _among(jump.vocabulary, full)
            for index, y in enumerate(predicted):
                own = jump.logits(frozen, y[rows]).float().log_softmax(-1)
                loss[index] += float(_divergence(full, own).sum(dtype=torch.float64))
                top = own.argmax(-1)
                same.append((top if jump.vocabulary is None else jump.vocabulary[top]) == chosen)
            agree.append(torch.stack(same).cpu())
        tell(tokens.numel())
    return _figures(loss, torch.cat(agree, 1), positions.shape, jump.chained)


def _figures(loss: Tensor, agree: Tensor, shape: torch.Size, chained: bool) -> Figures:
    """Figures of summed losses [outputs], and of where each agrees [outputs, n p]."""
    count = agree.shape[1]
    shares = (agree.double().sum(1) / count).tolist()
    chain = None
    if chained:
        steps, places = len(agree), agree.view(-1, *shape)
        # A chain's steps are at one token each, one after the other.
        starts = shape[1] - steps + 1
        diagonals = torch.stack([places[step, :, step : step + starts] for step in range(steps)])
        chain = tuple(diagonals.cumprod(0).double().mean((1, 2)).tolist())
    return Figures(tuple((loss / count).tolist()), tuple(shares), chain)


def _full(
    frozen: Frozen, states: States, tokens: Tensor, logits_rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the tokens, and the full model's log probabilities of each [m, V]."""
    last = states.last.reshape(-1, states.last.shape[-1])
    for start in range(0, len(tokens), logits_rows):
        rows = slice(start, start + logits_rows)
        yield rows, frozen.full_log_probs(last[tokens[rows]])


def _among(vocabulary: Tensor | None, full: Tensor) -> Tensor:
    """Log probabilities [m, D] among some tokens [D] only, of those [m, V] among all."""
    return full if vocabulary is None else full[:, vocabulary].log_softmax(-1)


def _divergence(full: Tensor, own: Tensor) -> Tensor:
    """KL(full || own) of each row [m], nats, of log probabilities [m, D]."""
    return (full.exp() * (full - own)).sum(-1)
