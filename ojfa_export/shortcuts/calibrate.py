"""From hidden states to the one shortcut, its measured quality, and the reason for the choice."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.decoding.arrays import Float32
from ojfa_export.errors import OjfaError
from ojfa_export.graphs.fold import FoldedHead, fold
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.choose import (
    Choice,
    TransferMatrix,
    choose,
    choose_kind,
    transfer_matrix,
)
from ojfa_export.shortcuts.distil import Distilled, distil, split_rows
from ojfa_export.shortcuts.fit import fit_levels, rows_needed
from ojfa_export.shortcuts.hidden import HiddenStates
from ojfa_export.shortcuts.kinds import ExitMap, Shipped
from ojfa_export.shortcuts.metrics import ExitQuality, FullModelReference, evaluate
from ojfa_export.shortcuts.moments import Moments
from ojfa_export.shortcuts.narrow_tokens import NarrowTokens
from ojfa_export.shortcuts.residual import fit_residual
from ojfa_export.shortcuts.sample import Sample, exit_sample, matrix_sample
from ojfa_export.system.progress import Progress

ROWS_AT_ONCE = 4_096
# Rows of the closed-form residual fit, where twice the hidden size is no more: it is only where
# distillation begins.
RESIDUAL_ROWS = 4_096
WITHOUT_TORCH = "The shared residual jump was not tried: it needs torch, which is not installed."


@dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        shortcut: The one jump that ships.
        head: What its exit head is made of: the jump folded with final norm and LM head, or a
            residual jump as it is.
        choice: The level of the one narrow jump.
        reason: Why that level and that kind.
        matrix: Quality of each level's narrow jump at each exit.
        one_jump: Quality of the chosen narrow jump, for exits 1..L-1.
        multi_jump: Quality of each exit's own narrow jump.
        identity: Quality of no jump at all.
        residual: Quality of the shared residual jump; None where it was not fitted.
        tokens_measured: Held-out tokens behind the figures of an exit.
    """

    shortcut: Shortcut
    head: FoldedHead | Shortcut
    choice: Choice
    reason: str
    matrix: TransferMatrix
    one_jump: list[ExitQuality]
    multi_jump: list[ExitQuality]
    identity: list[ExitQuality]
    residual: list[ExitQuality] | None
    tokens_measured: int


def calibrate(
    states: HiddenStates,
    blocks: int,
    fit_tokens: int,
    head: LanguageHead,
    rank: int,
    kind: Shipped | None,
    scratch: Path,
    progress: Progress,
) -> Calibrated:
    """Fits the narrow jumps and the residual one, measures them at every exit, and chooses.

    Args:
        states: Hidden states of all depths; the first `fit_tokens` rows are for fitting.
        blocks: L.
        fit_tokens: Rows to fit on; the others are held out.
        head: The model's own norm and head.
        rank: Of the jump.
        kind: What ships; None for the better one.
        scratch: Folder for the full model's log-probabilities.
        progress: Shows levels.

    Raises:
        OjfaError: A residual jump is asked for, and torch is not installed.
    """
    shortcuts = fit_levels(_moments(states, blocks, fit_tokens, progress), rank)
    sample = matrix_sample(states, blocks, fit_tokens, head)
    choice, matrix = choose_level(shortcuts, sample, head, scratch, progress)
    one_jump = replace(shortcuts[choice.fitted_at - 1], kind="ojfa")
    folded = fold(one_jump, head.norm, head.weight, head.bias)
    distilled: Shortcut | None = None
    if kind != "ojfa" and (kind == "residual" or has_torch()):
        _, result = fit_shared_residual(states, blocks, fit_tokens, head, rank, progress)
        distilled = result.shortcut
    sample = exit_sample(states, blocks, fit_tokens, head)
    reference = FullModelReference(sample.hidden(blocks), head, scratch)
    narrow = NarrowTokens(folded)
    one, multi, identity, residual = [], [], [], []
    with progress.task("calibrating: measuring exits", blocks - 1, "exits") as task:
        for depth, shortcut in enumerate(shortcuts, start=1):
            hidden = sample.hidden(depth)
            own = fold(shortcut, head.norm, head.weight, head.bias)
            one.append(evaluate(narrow, hidden, reference))
            multi.append(evaluate(own.likeliest, hidden, reference))
            identity.append(evaluate(head.likeliest, hidden, reference))
            if distilled is not None:
                residual.append(
                    evaluate(partial(tokens_of, distilled, head, depth), hidden, reference)
                )
            task.advance()
    if distilled is None:
        kind, why = "ojfa", "" if kind else WITHOUT_TORCH
    else:
        kind, why = choose_kind(kind, one, residual, one_jump, distilled, head.weight.shape)
    ships = one_jump if distilled is None or kind == "ojfa" else distilled
    return Calibrated(
        shortcut=ships,
        head=ships if ships.residual else folded,
        choice=choice,
        reason=f"{choice.reason} {why}".strip(),
        matrix=matrix,
        one_jump=one,
        multi_jump=multi,
        identity=identity,
        residual=residual or None,
        tokens_measured=len(sample.rows),
    )


def fit_shared_residual(
    states: HiddenStates,
    blocks: int,
    fit_tokens: int,
    head: LanguageHead,
    rank: int,
    progress: Progress,
) -> tuple[Shortcut, Distilled]:
    """Fits the shared residual jump in closed form, then distils it: both.

    Raises:
        OjfaError: torch is not installed.
    """
    if not has_torch():
        raise OjfaError(
            "a residual shortcut is distilled with torch, which is not installed",
            hint="pip install 'ojfa-export[verify]', or build with --shortcut ojfa",
        )
    rows, _ = split_rows(fit_tokens)
    most = max(RESIDUAL_ROWS, rows_needed(states.shape[1]))
    rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]
    with progress.task("calibrating: fitting the residual jump", 1, "fits") as task:
        begin = fit_residual(states.open, blocks, rows, rank)
        task.advance()
    return begin, distil(begin, states.open, fit_tokens, head, progress=progress)


def tokens_of(
    shortcut: ExitMap, head: LanguageHead, depth: int, hidden: Float32
) -> NDArray[np.int64]:
    """Likeliest tokens [n] of a jump through the model's own head."""
    return head.likeliest(shortcut.apply(hidden, depth))


def has_torch() -> bool:
    """Whether a residual jump can be distilled here."""
    return importlib.util.find_spec("torch") is not None


def choose_level(
    shortcuts: list[Shortcut],
    sample: Sample,
    head: LanguageHead,
    scratch: Path,
    progress: Progress,
) -> tuple[Choice, TransferMatrix]:
    """Measures each level's narrow jump at every exit, and chooses the best for all of them."""
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
