"""What a trained jump's exits say on text that the model writes, in torch: for promises on it.

The same statistics as a build collects from its engines (`promises.collect`), of a jump under
training, at any exits; and with confidences of a check that looks at the most frequent tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ojfa_export.bundle.promise import Limits
from ojfa_export.compiler import self_text
from ojfa_export.decoding.arrays import Int32
from ojfa_export.promises.collect import compare, sample_places
from ojfa_export.promises.measures import MEASURES, round_down
from ojfa_export.promises.self_text import DOMAIN, divide, windows_to_write
from ojfa_export.promises.statistics import SPLITS, ExitStatistics, save_statistics
from ojfa_export.promises.windows import PromiseWindows
from ojfa_export.system.progress import Progress
from ojfa_export.training.inputs import Inputs
from ojfa_export.training.kinds.jump import Jump
from ojfa_export.training.windows import TrainingText
from ojfa_export.writing.frozen import Frozen, States
from ojfa_export.writing.self_text import Starts, write

# The strictest promise that is looked at decides how much text there is.
STRICTEST = Limits(max_disagreement=0.02)
WINDOWS_AT_ONCE, ROWS = 32, 2048
WHOLE = 0  # in place of a number of tokens: the whole head


@dataclass(frozen=True)
class Judged:
    """Windows that the model wrote for a promise, and which tokens a check may look at.

    Attributes:
        windows: Written with a build's seed for promises, divided.
        checks: Numbers of tokens of a check's head; WHOLE for the whole head.
        frequent: Token ids [V], the most frequent first.
    """

    windows: PromiseWindows
    checks: tuple[int, ...]
    frequent: Int32


class Promised:
    """Keeps what exits say on text that the model writes for a promise.

    Args:
        directory: For NAME-TOKENS.npz of each jump; of a check of the whole head NAME-0.npz.
        checks: Numbers of tokens that a check may look at.
        inputs: Of the training; the model writes.
        text: That jumps are trained on: what is frequent there is frequent.
        scratch: Where the windows are kept.
        progress: Shows tokens.
    """

    def __init__(
        self,
        directory: Path,
        checks: Sequence[int],
        inputs: Inputs,
        text: TrainingText,
        scratch: Path,
        progress: Progress,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._frozen = Frozen(inputs.checkpoint, inputs.device, torch.float32)
        assert inputs.starts is not None, "--statistics needs --self-text"
        windows = write_windows(self._frozen, inputs, inputs.starts, scratch, progress)
        frequent = most_frequent(text.windows, inputs.checkpoint.spec.vocab_size)
        self._judged = Judged(windows, (WHOLE, *checks), frequent)

    def keep(self, jump: Jump, name: str) -> None:
        """Writes a jump's statistics."""
        for check, splits in collect(self._frozen, jump, self._judged).items():
            save_statistics(self._directory / f"{name}-{check}.npz", splits)


def write_windows(
    frozen: Frozen, inputs: Inputs, starts: Starts, directory: Path, progress: Progress
) -> PromiseWindows:
    """Text as a build with a promise on self-text has it."""
    length = min(self_text.LENGTH, inputs.length)
    kinds = 2 if starts.chat else 1
    count = windows_to_write(None, STRICTEST, kinds)
    wrote = write(frozen, starts, length, count * length, self_text.SEED, directory, progress)
    return divide(wrote.windows, wrote.parts, kinds, wrote.given)


def most_frequent(windows: Int32, vocab_size: int) -> Int32:
    """Token ids, the most frequent first."""
    counts = np.bincount(windows.ravel(), minlength=vocab_size)
    return np.argsort(-counts, kind="stable").astype(np.int32)


@torch.no_grad()
def collect(frozen: Frozen, jump: Jump, judged: Judged) -> dict[int, Mapping[str, ExitStatistics]]:
    """Both splits' statistics, by the number of tokens that a check looks at.

    Args:
        frozen: The model, in fp32, as engines' argmax is not that of bf16.
        jump: From exits.
        judged: The text.
    """
    text, parts = judged.windows, {}
    for split in SPLITS:
        [windows] = getattr(text, split)
        parts[split] = _collect(frozen, jump, judged, windows, text.given)
    return {
        check: {split: parts[split][index] for split in SPLITS}
        for index, check in enumerate(judged.checks)
    }


def _collect(
    frozen: Frozen, jump: Jump, judged: Judged, windows: Int32, given: int
) -> list[ExitStatistics]:
    count, length = windows.shape
    places, run = sample_places(np.random.default_rng(0), count, length - given)
    places += given
    shape = (count, places.shape[1], len(jump.outputs))
    confidence = np.empty((len(judged.checks), len(MEASURES), *shape), np.float16)
    agrees, extra = np.empty(shape, np.bool_), np.empty(shape, np.float16)
    some = [
        None if check == WHOLE else torch.from_numpy(judged.frequent[:check]).to(frozen.device)
        for check in judged.checks
    ]
    for start in range(0, count, WINDOWS_AT_ONCE):
        rows = slice(start, start + WINDOWS_AT_ONCE)
        part = torch.from_numpy(windows[rows]).long()
        first = torch.arange(len(part))[:, None] * length
        tokens = (first + torch.from_numpy(places[rows])).flatten().to(frozen.device)
        states = frozen.states(part)
        said, same, behind = _said(frozen, jump, states, tokens, some)
        confidence[:, :, rows] = said.reshape(*said.shape[:2], len(part), *shape[1:])
        agrees[rows], extra[rows] = (
            same.reshape(len(part), *shape[1:]),
            behind.reshape(len(part), *shape[1:]),
        )
    domain = np.zeros(count, np.int16)
    return [
        ExitStatistics(
            frozen.spec.blocks, jump.outputs, (DOMAIN,), domain, each, agrees, extra, run
        )
        for each in confidence
    ]


def _said(
    frozen: Frozen, jump: Jump, states: States, tokens: Tensor, some: Sequence[Tensor | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences [checks, 3, n, E], whether exits agree [n, E], and their extra surprisal."""
    last = states.last.reshape(-1, states.last.shape[-1])
    predicted = jump.predict(states, jump.outputs, tokens)
    said = np.empty((len(some), len(MEASURES), len(tokens), len(predicted)), np.float16)
    same = np.empty((len(tokens), len(predicted)), np.bool_)
    extra = np.empty(same.shape, np.float16)
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        chosen = []
        for exit, y in enumerate(predicted):
            logits = frozen.logits(y[rows]).float()
            chosen.append(logits.argmax(-1))
            for index, ids in enumerate(some):
                looked = logits if ids is None else logits[:, ids]
                said[index, :, rows, exit] = round_down(confidences(looked))
        full = frozen.full_logits(last[tokens[rows]]).float().cpu().numpy()
        same[rows], extra[rows] = compare(full, torch.stack(chosen, 1).cpu().numpy())
    return said, same, extra


def confidences(logits: Tensor) -> np.ndarray:
    """As `promises.measures.confidences`, [3, n] float32, of logits [n, V] on any device."""
    log = logits.log_softmax(-1)
    top = log.topk(2, -1).values.exp()
    entropy = (log.exp() * log).sum(-1)
    found: np.ndarray = torch.stack([top[:, 0], top[:, 0] - top[:, 1], entropy]).cpu().numpy()
    return found
