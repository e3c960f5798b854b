"""The training loop; it knows nothing of kinds of jump."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ojfa_export.errors import CalibrationError
from ojfa_export.system.progress import Progress, Task
from ojfa_export.training.divergence import Figures, learn, measure
from ojfa_export.training.draw import Draw, draw, held_out_positions
from ojfa_export.training.kinds.jump import Jump
from ojfa_export.training.sizes import CHECKED_WINDOWS, HELD_OUT_TOKENS, STEPS, Sizes, choose
from ojfa_export.training.state import Keeper, State
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen, States

# AdamW (Loshchilov and Hutter, arXiv 1711.05101), a cosine rate after a short rise.
BETAS = 0.9, 0.98
WEIGHT_DECAY = 0.01
WARM_UP = 50
LAST_RATE = 0.05
# Rates are those of `STEPS` steps. With a twelfth of them three times the rate ends much lower
# (1.61 nats instead of 1.82, demo checkpoint).
MOST_BOOST = 3.0
GRADIENT_NORM = 1.0
# Checks in a row without a gain, after which there is no more to be had.
PATIENCE = 3
# Windows that statistics are taken of before training.
PREPARED = 32


@dataclass(frozen=True)
class Trained:
    """A trained jump's figures; the jump itself holds the best state.

    Attributes:
        begin: Figures of the jump before training.
        figures: Of the jump.
        best_step: When it was as it is; 0 is before training.
        steps: Taken.
        history: Step and held-out loss of every check.
        seconds: In all runs.
        tokens: Read in all steps.
        held_out_tokens: Measured.
    """

    begin: Figures
    figures: Figures
    best_step: int
    steps: int
    history: list[tuple[int, float]]
    seconds: float
    tokens: int
    held_out_tokens: int


def train_jump(
    frozen: Frozen,
    jump: Jump,
    text: TrainingText,
    passes: int,
    seed: int,
    keeper: Keeper,
    progress: Progress,
) -> Trained:
    """Trains a jump on a text; the same on the same machine, killed in between or not.

    Args:
        frozen: The model.
        jump: At its beginning; holds the best state afterwards.
        text: Of which a part is held out.
        passes: Over the text.
        seed: Of what steps look at.
        keeper: Of the state, from which an earlier run's training goes on.
        progress: Shows tokens.

    Raises:
        CheckpointError: The model's own logits are NaN or infinite.
        CalibrationError: Training diverges.
        OSError: The state can't be written.
    """
    training, _ = text.held_out()
    sizes = choose(
        frozen.spec,
        len(training),
        text.windows.shape[1],
        passes,
        len(jump.learned),
        frozen.memory_left,
    )
    return _Loop(frozen, jump.to(frozen.device), text, sizes, seed, keeper).run(progress)


class _Loop:
    """A training under way.

    Args:
        frozen: The model.
        jump: At its beginning, on the model's device.
        text: Of which a part is held out.
        sizes: Of the steps.
        seed: Of what steps look at.
        keeper: Of the state.
    """

    def __init__(
        self,
        frozen: Frozen,
        jump: Jump,
        text: TrainingText,
        sizes: Sizes,
        seed: int,
        keeper: Keeper,
    ) -> None:
        self._frozen, self._jump, self._text = frozen, jump, text
        self._sizes, self._seed, self._keeper = sizes, seed, keeper
        self._training, self._held_out = text.held_out()
        self._length = text.windows.shape[1]
        self._beginning = self._copy()
        self._given = max(text.given, jump.first)
        count = len(self._held_out)
        positions = held_out_positions(
            seed, count, self._length, self._given, HELD_OUT_TOKENS, jump.chained
        )
        self._positions = torch.from_numpy(positions.astype(np.int64))
        self._checked = slice(None, None, -(-count // CHECKED_WINDOWS))
        self._optimiser = torch.optim.AdamW(
            [{"params": [each], "base": lr} for each, lr in _rates(jump, sizes.steps)],
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=frozen.device.type == "cuda",
        )

    def run(self, progress: Progress) -> Trained:
        """Trains from the beginning, or from the state that is kept."""
        start, sizes = time.monotonic(), self._sizes
        state = self._resume() or self._begin()
        before = state.seconds
        step_tokens = sizes.rows * self._length
        left = (sizes.steps - state.step) * step_tokens
        with progress.task("training", left, "tokens") as task:
            while state.step < sizes.steps and state.stale < PATIENCE:
                self._step(state.step, task)
                state.step += 1
                if sizes.checked(state.step):
                    self._check(state)
                if self._keeper.due:
                    state.seconds = before + time.monotonic() - start
                    self._save(state)
        seconds = before + time.monotonic() - start
        return self._finish(state, seconds, progress)

    def _begin(self) -> State:
        self._jump.prepare(self._prepared())
        loss = self._measure(self._checked).mean_loss
        return State(0, {}, {}, self._copy(), 0, loss, 0, [(0, loss)], 0.0)

    def _finish(self, state: State, seconds: float, progress: Progress) -> Trained:
        """Measures on more windows than checks do."""
        tokens = self._positions.numel()
        with progress.task("training: measuring held-out text", 2 * tokens, "tokens") as task:
            self._jump.load_state_dict(self._beginning)
            begin = self._measure(slice(None), task.advance)
            self._jump.load_state_dict(state.best)
            figures = self._measure(slice(None), task.advance)
        best_step = state.best_step
        if figures.mean_loss >= begin.mean_loss:  # the checks saw fewer, and may be wrong
            self._jump.load_state_dict(self._beginning)
            best_step, figures = 0, begin
        return Trained(
            begin,
            figures,
            best_step,
            state.step,
            state.history,
            seconds,
            state.step * self._sizes.rows * self._length,
            tokens,
        )

    def _prepared(self) -> Iterator[States]:
        """States of some windows from all of the training text."""
        picked = self._training[:: -(-len(self._training) // PREPARED)]
        for start in range(0, len(picked), self._sizes.rows_at_once):
            yield self._frozen.states(self._ids(picked[start : start + self._sizes.rows_at_once]))

    def _resume(self) -> State | None:
        state = self._keeper.load(self._frozen.device)
        if state is not None:
            self._jump.load_state_dict(state.jump)
            self._optimiser.load_state_dict(dict(state.optimiser))
        return state

    def _save(self, state: State) -> None:
        state.jump, state.optimiser = self._jump.state_dict(), self._optimiser.state_dict()
        self._keeper.save(state)

    def _step(self, step: int, task: Task) -> None:
        sizes = self._sizes
        for group in self._optimiser.param_groups:
            group["lr"] = group["base"] * rate(step, sizes.steps)
        drawn = draw(
            self._seed,
            step,
            sizes,
            self._training,
            self._length,
            self._given,
            self._jump.learned,
        )
        loss = 0.0
        for first in range(0, sizes.rows, sizes.rows_at_once):
            loss += self._learn(drawn, first)
            task.advance(self._length * min(sizes.rows_at_once, sizes.rows - first))
        norm = torch.nn.utils.clip_grad_norm_(self._jump.parameters(), GRADIENT_NORM)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            raise CalibrationError(
                f"training diverged at step {step}: its loss is no number any more",
                hint="try another --seed, or a smaller jump",
            )
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    def _learn(self, drawn: Draw, first: int) -> float:
        """The gradient of some windows of a step, from the one with number `first` on."""
        end = first + self._sizes.rows_at_once
        states = self._frozen.states(self._ids(drawn.windows[first:end]))
        rows, positions = drawn.tokens[:, 0], drawn.tokens[:, 1]
        here = (rows >= first) & (rows < end)
        if not here.any():
            return 0.0
        places = (rows[here] - first).astype(np.int64) * self._length + positions[here]
        return learn(
            self._frozen,
            self._jump,
            states,
            drawn.outputs,
            torch.from_numpy(places).to(self._frozen.device),
            1 / len(rows),
            self._sizes.logits_rows,
        )

    def _check(self, state: State) -> None:
        """Looks at the held-out text, and keeps the jump where it is the best so far."""
        loss = self._measure(self._checked).mean_loss
        state.history.append((state.step, loss))
        if loss < state.best_loss:
            state.best, state.best_step, state.best_loss = self._copy(), state.step, loss
            state.stale = 0
        else:
            state.stale += 1

    def _measure(self, which: slice, tell: Callable[[int], None] = lambda tokens: None) -> Figures:
        """Figures on some of the held-out windows."""
        sizes = self._sizes
        return measure(
            self._frozen,
            self._jump,
            self._ids(self._held_out[which]),
            self._positions[which],
            sizes.rows_at_once,
            sizes.logits_rows,
            tell,
        )

    def _ids(self, windows: np.ndarray) -> Tensor:
        return torch.from_numpy(self._text.windows[windows].astype(np.int64))

    def _copy(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self._jump.state_dict().items()}


def _rates(jump: Jump, steps: int) -> Iterator[tuple[torch.nn.Parameter, float]]:
    """Parameters and their largest learning rates, which are higher where steps are few."""
    few = min(max(1.0, math.sqrt(STEPS / steps)), MOST_BOOST)
    for name, each in jump.named_parameters():
        yield each, jump.learning_rate * jump.faster.get(name, 1.0) * few


def rate(step: int, steps: int) -> float:
    """The share of the largest learning rate at a step: a short rise, then a cosine."""
    warm = max(1, min(WARM_UP, steps // 4))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warm) * (cosine * (1 - LAST_RATE) + LAST_RATE)
