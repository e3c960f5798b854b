"""Which gates of a shared residual jump are worth opening."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.residual import HiddenByDepth
from ojfa_export.system.progress import Progress

TOKENS = 1024
# A gate other than 0 must agree with the full model on more tokens than the identity does, by this
# many standard errors of the difference: at late exits the two are close, and 0 is never worse.
SURE = 2.0


def close_gates(
    shortcut: Shortcut,
    hidden: HiddenByDepth,
    rows: NDArray[np.int64],
    head: LanguageHead,
    progress: Progress,
) -> tuple[Shortcut, tuple[int, ...]]:
    """Sets gates to 0 where the identity agrees with the full model about as often.

    Args:
        shortcut: With gates, for exits 1..L-1.
        hidden: Hidden states [n, H] at depths 1..L; memory maps will do.
        rows: Tokens that distillation didn't train on, of which some are looked at.
        head: The model's own norm and head.
        progress: Shows exits.

    Returns:
        The jump, and the exits whose gate is 0.
    """
    assert shortcut.gates is not None
    tokens = rows[:: max(1, len(rows) // TOKENS)]
    blocks = shortcut.gates.size + 1
    agreement = _Agreement(head, np.asarray(hidden(blocks)[tokens], np.float32))
    gates, closed = shortcut.gates.copy(), []
    with progress.task("calibrating: comparing gates with none", blocks - 1, "exits") as task:
        for exit in range(1, blocks):
            h = np.asarray(hidden(exit)[tokens], np.float32)
            gain = agreement.of(shortcut.apply(h, exit)).astype(float) - agreement.of(h)
            if gain.mean() < SURE * gain.std() / math.sqrt(len(tokens)) or not gain.any():
                gates[exit - 1] = 0
                closed.append(exit)
            task.advance()
    return replace(shortcut, gates=gates), tuple(closed)


class _Agreement:
    """Whether exits choose the full model's tokens.

    Most rows of early exits don't, which a few logits show: where any token's is above that of the
    full model's choice, the choice is another, whichever is the largest. So the tokens that the
    full model chooses anywhere come first, and the whole vocabulary for the rows that are left.

    Args:
        head: The model's own norm and head.
        final: [n, H] the last block's output.
    """

    def __init__(self, head: LanguageHead, final: Float32) -> None:
        self._head, self._full = head, head.likeliest(final)
        frequent, self._column = np.unique(self._full, return_inverse=True)
        bias = None if head.bias is None else head.bias[frequent]
        self._few = LanguageHead(head.norm, head.weight[frequent], bias)

    def of(self, y: Float32) -> NDArray[np.bool_]:
        """For y [n, H], guesses at the last block's output: [n]."""
        logits = self._few.logits(y)
        own = np.take_along_axis(logits, self._column[:, None], axis=1)
        agrees = np.asarray((logits <= own).all(axis=1))
        left = np.flatnonzero(agrees)
        agrees[left] = self._head.likeliest(y[left]) == self._full[left]
        return agrees
