"""From hidden states to the one shortcut, its measured quality, and the reason for the choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Float32
from ojfa_export.calibrate.hidden import HiddenStates
from ojfa_export.progress import Progress
from ojfa_export.shortcut import (
    Choice,
    ExitQuality,
    FoldedHead,
    FullModelReference,
    LanguageHead,
    Moments,
    Shortcut,
    TransferMatrix,
    choose,
    evaluate,
    fit_levels,
    fold,
    transfer_matrix,
)

# Held-out tokens for the figures of each exit, within the logits in all that take a few minutes on
# two cores: 4,000 give Precision@1 to within 0.008 (one standard error), 1,000 to within 0.016.
EXIT_LOGITS = 3_000_000_000
EXIT_TOKENS = 1_000, 4_000
# The matrix measures (L-1)^2 pairs, each a row of V logits per token; this many logits in all
# take a minute or two on two cores.
MATRIX_LOGITS = 40_000_000_000
MATRIX_TOKENS = 250, 1_000
ROWS_AT_ONCE = 4_096


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        shortcut: The one jump.
        folded: The jump, the final norm and the LM head as one head.
        choice: Its level and why.
        matrix: Quality of each level's jump at each exit.
        one_jump: Quality of the chosen jump, for exits 1..L-1.
        multi_jump: Quality of each exit's own jump.
        identity: Quality of no jump at all.
        tokens_measured: Held-out tokens behind the figures of an exit.
    """

    shortcut: Shortcut
    folded: FoldedHead
    choice: Choice
    matrix: TransferMatrix
    one_jump: list[ExitQuality]
    multi_jump: list[ExitQuality]
    identity: list[ExitQuality]
    tokens_measured: int


def calibrate(
    states: HiddenStates,
    blocks: int,
    fit_tokens: int,
    head: LanguageHead,
    rank: int,
    scratch: Path,
    progress: Progress,
) -> Calibrated:
    """Fits a jump at every level, measures each at every exit, and chooses one.

    Args:
        states: Hidden states of all depths; the first `fit_tokens` rows are for fitting.
        blocks: L.
        fit_tokens: Rows to fit on; the others are held out.
        head: The model's own norm and head.
        rank: Of the jump.
        scratch: Folder for the full model's log-probabilities.
        progress: Shows levels.
    """
    shortcuts = fit_levels(_moments(states, blocks, fit_tokens, progress), rank)
    held_out = states.shape[0] - fit_tokens
    budget = MATRIX_LOGITS // (max(1, blocks - 1) ** 2 * head.weight.shape[0])
    sample = _Sample(states, blocks, fit_tokens, min(held_out, _within(MATRIX_TOKENS, budget)))
    choice, matrix = _choose(shortcuts, sample, head, scratch, progress)
    fitted = shortcuts[choice.fitted_at - 1]
    one_jump = replace(fitted, kind="ojfa")
    folded = fold(one_jump, head.norm, head.weight, head.bias)
    budget = EXIT_LOGITS // (blocks * head.weight.shape[0])
    sample = _Sample(states, blocks, fit_tokens, min(held_out, _within(EXIT_TOKENS, budget)))
    reference = FullModelReference(sample.hidden(blocks), head, scratch)
    one, multi, identity = [], [], []
    with progress.task("calibrating: measuring exits", blocks - 1, "exits") as task:
        for depth, shortcut in enumerate(shortcuts, start=1):
            hidden = sample.hidden(depth)
            own = fold(shortcut, head.norm, head.weight, head.bias)
            one.append(evaluate(folded.logits, hidden, reference))
            multi.append(evaluate(own.logits, hidden, reference))
            identity.append(evaluate(head.logits, hidden, reference))
            task.advance()
    return Calibrated(one_jump, folded, choice, matrix, one, multi, identity, len(sample.rows))


class _Sample:
    """Held-out tokens, evenly spread over those that there are."""

    def __init__(self, states: HiddenStates, blocks: int, fit_tokens: int, count: int) -> None:
        self.rows = np.linspace(fit_tokens, states.shape[0] - 1, count).astype(np.int64)
        self._states = states

    def hidden(self, depth: int) -> Float32:
        """Their hidden states at a depth, [count, H]."""
        return np.asarray(self._states.open(depth)[self.rows])


def _choose(
    shortcuts: list[Shortcut],
    sample: _Sample,
    head: LanguageHead,
    scratch: Path,
    progress: Progress,
) -> tuple[Choice, TransferMatrix]:
    blocks = len(shortcuts) + 1
    reference = FullModelReference(sample.hidden(blocks), head, scratch)
    levels = [sample.hidden(depth) for depth in range(1, blocks)]
    with progress.task("calibrating: measuring jumps", len(levels) ** 2, "pairs") as task:
        done = 0

        def report(count: int, _: int) -> None:
            nonlocal done
            task.advance(count - done)
            done = count

        matrix = transfer_matrix(
            shortcuts, levels, head.norm, head.weight, head.bias, reference, report
        )
    choice = choose(matrix)
    measured = f" Measured on {len(sample.rows):,} held-out tokens."
    return replace(choice, reason=choice.reason + measured), matrix


def _moments(
    states: HiddenStates, blocks: int, fit_tokens: int, progress: Progress
) -> Iterator[Moments]:
    """Moments of each level against the last block's output, one level in memory at a time."""
    with progress.task("calibrating: fitting jumps", blocks - 1, "levels") as task:
        for depth in range(1, blocks):
            moments = Moments(states.shape[1])
            source, target = states.open(depth), states.open(blocks)
            for start in range(0, fit_tokens, ROWS_AT_ONCE):
                rows = slice(start, min(start + ROWS_AT_ONCE, fit_tokens))
                moments.update(source[rows], target[rows])
            yield moments
            task.advance()


def _within(bounds: tuple[int, int], value: int) -> int:
    least, most = bounds
    return max(least, min(value, most))
