"""The training loop: next-token cross-entropy, AdamW, warm-up and cosine, best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Schedule:
    """When training ends, and the learning rate until then."""

    seconds: float
    steps: int
    peak: float
    warm_up_steps: int = 300

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the budget that is used, in 0..1: of the steps or the seconds."""
        return min(1.0, max(step / self.steps, elapsed / self.seconds))

    def learning_rate(self, step: int, elapsed: float) -> float:
        """Linear warm-up, then a cosine from `peak` to a hundredth of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, elapsed)))
        return self.peak * min(1.0, (step + 1) / self.warm_up_steps) * (0.01 + 0.99 * cosine)


@dataclass
class Run:
    """What a training run has seen, and its best weights so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    training_loss: float = math.inf
    best_loss: float = math.inf
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)


def next_token_loss(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats/token of int64 `windows` [batch, context + 1]."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: torch.Tensor, context: int, batch: int) -> float:
    """Mean loss in nats/token over all of `tokens`, in windows that share only their edges."""
    model.eval()
    starts = range(0, tokens.numel() - 1, context)
    windows = [tokens[start : start + context + 1] for start in starts]
    full = [window for window in windows if window.numel() == context + 1]
    batches = [torch.stack(full[i : i + batch]) for i in range(0, len(full), batch)]
    if len(full) < len(windows):
        batches.append(windows[-1][None])
    total = sum(float(next_token_loss(model, b)) * b[:, 1:].numel() for b in batches)
    model.train()
    return total / (tokens.numel() - 1)


def build_optimizer(model: PreTrainedModel, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices and none on the norms' gains."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


def train(
    model: PreTrainedModel,
    train_tokens: torch.Tensor,
    held_out_tokens: torch.Tensor,
    schedule: Schedule,
    *,
    context: int,
    batch: int,
) -> Run:
    """Trains on random windows until the schedule ends; the best held-out weights are in the run.

    The clock starts after the first step, so that compilation costs no training time.
    """
    device = train_tokens.device
    loss_of: Callable[..., torch.Tensor] = next_token_loss
    if device.type == "cuda":
        loss_of = torch.compile(next_token_loss, dynamic=False)
    optimizer = build_optimizer(model, device)
    offsets = torch.arange(context + 1, device=device)
    run, started, reported, evaluated = Run(), time.monotonic(), 0.0, 0.0
    model.train()
    while schedule.progress(run.steps, run.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(run.steps, run.seconds)
        starts = torch.randint(train_tokens.numel() - context, (batch, 1)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, train_tokens[starts + offsets])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.steps += 1
        run.tokens += batch * context
        if run.steps == 1:
            run.training_loss, started = loss.item(), time.monotonic()
        if run.steps % 10 == 0:
            run.training_loss = loss.item()  # waits for the device, so the clock tells the truth
        run.seconds = time.monotonic() - started
        progress = schedule.progress(run.steps, run.seconds)
        if progress - evaluated >= 0.04 or progress == 1:
            evaluated = progress
            keep_if_best(run, model, held_out_loss(model, held_out_tokens, context, batch))
            run.seconds = time.monotonic() - started
        if run.seconds - reported >= 10 or progress == 1:
            reported = run.seconds
            print(progress_line(run, schedule), flush=True)
    return run


def keep_if_best(run: Run, model: PreTrainedModel, loss: float) -> None:
    """Keeps a copy of the weights if they have the lowest held-out loss so far."""
    print(f"held-out loss {loss:.4f} after {run.tokens / 1e6:.1f} M tokens", flush=True)
    if loss < run.best_loss:
        run.best_loss = loss
        run.best_weights = {name: value.clone() for name, value in model.state_dict().items()}


def progress_line(run: Run, schedule: Schedule) -> str:
    """One line: loss, speed, elapsed and remaining time."""
    progress = max(schedule.progress(run.steps, run.seconds), 1e-9)
    remaining = run.seconds / progress - run.seconds
    speed = run.tokens / max(run.seconds, 1e-9)
    return (
        f"step {run.steps:6d}  {run.tokens / 1e6:8.1f} M tokens  "
        f"loss {run.training_loss:.4f}  best held-out {run.best_loss:.4f}  "
        f"{speed / 1e3:.0f} k tokens/s  elapsed {run.seconds:.0f} s  remaining {remaining:.0f} s"
    )
