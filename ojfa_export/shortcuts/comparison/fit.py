"""Fits every kind of shortcut on the same hidden states."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.calibrate import choose_level, fit_shared_residual
from ojfa_export.shortcuts.choose import TransferMatrix
from ojfa_export.shortcuts.comparison.model import Descent, Distillation
from ojfa_export.shortcuts.descent import descend_n_njtc
from ojfa_export.shortcuts.fit import fit_n_njtc, training_loss
from ojfa_export.shortcuts.hidden import HiddenStates
from ojfa_export.shortcuts.kinds import (
    ExitMap,
    Identity,
    Kind,
    Linear,
    Narrow,
    PerExit,
    fit_jtc,
    fit_njtc,
)
from ojfa_export.shortcuts.moments import Moments
from ojfa_export.shortcuts.sample import matrix_sample
from ojfa_export.shortcuts.similarity import most_similar_level
from ojfa_export.system.progress import Progress

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fitted:
    """All kinds, fitted.

    Attributes:
        maps: By kind.
        seconds: What each took, processor time of all threads.
        levels: Where the jumps that were fitted at one level were.
        matrix: Quality of each level's narrow jump at each exit.
        descent: Closed form and gradient descent, for every level; empty where left out.
        distillation: Of the residual jump.
    """

    maps: dict[Kind, ExitMap]
    seconds: dict[Kind, float]
    levels: dict[Kind, int]
    matrix: TransferMatrix
    descent: list[Descent]
    distillation: Distillation


@dataclass
class _PerLevel:
    jtc: list[Linear]
    njtc: list[Narrow]
    n_njtc: list[Shortcut]
    seconds: dict[Kind, float]
    descent: list[Descent]


def fit_kinds(
    states: HiddenStates,
    blocks: int,
    fit_tokens: int,
    head: LanguageHead,
    rank: int,
    descend: bool,
    scratch: Path,
    progress: Progress,
) -> Fitted:
    """Fits every kind.

    Args:
        states: Hidden states of all depths; the first `fit_tokens` rows are for fitting.
        blocks: L.
        fit_tokens: Rows to fit on; the others are held out.
        head: The model's own norm and head.
        rank: Of the narrow and of the residual jumps.
        descend: Whether to train narrow jumps by gradient descent, too.
        scratch: Folder for the full model's log-probabilities.
        progress: Shows levels.

    Raises:
        OjfaError: torch is not installed.
    """
    each = _fit_levels(states, blocks, fit_tokens, rank, descend, progress)
    sample = matrix_sample(states, blocks, fit_tokens, head)
    choice, matrix = choose_level(each.n_njtc, sample, head, scratch, progress)
    alike = most_similar_level(each.n_njtc)
    mixed, mixed_seconds = timed(_fit_mixed, states, blocks, fit_tokens, rank, progress)
    (begin, distilled), residual_seconds = timed(
        fit_shared_residual, states, blocks, fit_tokens, head, rank, progress
    )
    maps: dict[Kind, ExitMap] = {
        "identity": Identity(),
        "jtc": PerExit(each.jtc),
        "njtc": PerExit(each.njtc),
        "n-njtc": PerExit(each.n_njtc),
        "ojfa": replace(each.n_njtc[choice.fitted_at - 1], kind="ojfa"),
        "ojfa-cosine": replace(each.n_njtc[alike - 1], kind="ojfa"),
        "mixed": mixed,
        "residual-closed-form": begin,
        "residual": distilled.shortcut,
    }
    seconds = {
        **each.seconds,
        "identity": 0.0,
        "ojfa": each.seconds["n-njtc"],
        "ojfa-cosine": each.seconds["n-njtc"],
        "mixed": mixed_seconds,
        "residual-closed-form": residual_seconds,
        "residual": residual_seconds,
    }
    gates = distilled.shortcut.gates
    return Fitted(
        maps=maps,
        seconds=seconds,
        levels={"ojfa": choice.fitted_at, "ojfa-cosine": alike},
        matrix=matrix,
        descent=each.descent,
        distillation=Distillation(
            steps=distilled.steps,
            loss_before=distilled.loss_before,
            loss_after=distilled.loss_after,
            gates=[] if gates is None else gates.tolist(),
            closed=list(distilled.closed),
        ),
    )


def _fit_levels(
    states: HiddenStates,
    blocks: int,
    fit_tokens: int,
    rank: int,
    descend: bool,
    progress: Progress,
) -> _PerLevel:
    """A map for every exit, of every such kind; one level's hidden states in memory at a time."""
    each = _PerLevel([], [], [], {"jtc": 0.0, "njtc": 0.0, "n-njtc": 0.0}, [])
    target = np.asarray(states.open(blocks)[:fit_tokens])
    with progress.task("comparing: fitting levels", blocks - 1, "levels") as task:
        for level in range(1, blocks):
            x = np.asarray(states.open(level)[:fit_tokens])
            moments, passing = timed(_moments, x, target)
            linear, seconds = timed(fit_jtc, moments)
            each.jtc.append(linear)
            each.seconds["jtc"] += passing + seconds
            narrow, seconds = timed(fit_njtc, moments, rank)
            each.njtc.append(narrow)
            each.seconds["njtc"] += passing + seconds
            normed, seconds = timed(fit_n_njtc, moments, rank, fitted_at=level)
            each.n_njtc.append(normed)
            each.seconds["n-njtc"] += passing + seconds
            if descend:
                trained, descending = timed(descend_n_njtc, x, target, rank, fitted_at=level)
                each.descent.append(
                    Descent(
                        level=level,
                        closed_loss=training_loss(moments, normed),
                        closed_seconds=passing + seconds,
                        descent_loss=training_loss(moments, trained),
                        descent_seconds=descending,
                    )
                )
            task.advance()
    return each


def _fit_mixed(
    states: HiddenStates, blocks: int, fit_tokens: int, rank: int, progress: Progress
) -> Shortcut:
    """One narrow jump on the hidden states of all levels together."""
    target, moments = np.asarray(states.open(blocks)[:fit_tokens]), Moments(states.shape[1])
    with progress.task("comparing: mixing levels", blocks - 1, "levels") as task:
        for level in range(1, blocks):
            moments.update(np.asarray(states.open(level)[:fit_tokens]), target)
            task.advance()
    return replace(fit_n_njtc(moments, rank, fitted_at=1), kind="mixed")


def _moments(x: Float32, y: Float32) -> Moments:
    moments = Moments(x.shape[1])
    moments.update(x, y)
    return moments


def timed(function: Callable[..., Result], *arguments: Any, **named: Any) -> tuple[Result, float]:
    """A function's result, and the processor time that it took in all threads.

    On a machine that others use too, this says more of the work than the clock does.
    """
    start = time.process_time()
    result = function(*arguments, **named)
    return result, time.process_time() - start
