"""Held-out tokens that shortcuts are measured on: how many, and their hidden states."""

from __future__ import annotations

import numpy as np

from ojfa_export.bundle.block_shortcut import BlocksOnSequences
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.hidden import HiddenStates

# Held-out tokens for the figures of each exit, within the logits in all that take half a minute on
# two cores: 4,000 give Precision@1 to within 0.008 (one standard error), 1,000 to within 0.016.
EXIT_LOGITS = 1_500_000_000
EXIT_TOKENS = 1_000, 4_000
# The matrix measures (L-1)^2 pairs, each a row of V logits per token; this many logits in all
# take a minute or two on two cores.
MATRIX_LOGITS = 40_000_000_000
MATRIX_TOKENS = 250, 1_000


class Sample:
    """Held-out tokens, evenly spread over those that there are."""

    def __init__(self, states: HiddenStates, blocks: int, fit_tokens: int, count: int) -> None:
        self.rows = np.linspace(fit_tokens, states.shape[0] - 1, count).astype(np.int64)
        self._states = states

    def hidden(self, depth: int) -> Float32:
        """Their hidden states at a depth, [count, H]."""
        return np.asarray(self._states.open(depth)[self.rows])

    def mapped(self, depth: int, jump: BlocksOnSequences) -> Float32:
        """What a block jump makes of them, [count, H]: whole windows go through it, one by one."""
        states, windows = self._states.open(depth), self.rows // jump.length
        found = np.empty((len(self.rows), states.shape[1]), np.float32)
        for window in np.unique(windows).tolist():
            start, here = window * jump.length, windows == window
            outputs = jump.apply(np.asarray(states[start : start + jump.length]), depth)
            found[here] = outputs[self.rows[here] - start]
        return found


def matrix_sample(states: HiddenStates, blocks: int, fit_tokens: int, head: LanguageHead) -> Sample:
    """Held-out tokens that the matrix is measured on."""
    budget = MATRIX_LOGITS // (max(1, blocks - 1) ** 2 * head.weight.shape[0])
    count = min(states.shape[0] - fit_tokens, within(MATRIX_TOKENS, budget))
    return Sample(states, blocks, fit_tokens, count)


def exit_sample(states: HiddenStates, blocks: int, fit_tokens: int, head: LanguageHead) -> Sample:
    """Held-out tokens that the exits are measured on."""
    budget = EXIT_LOGITS // (blocks * head.weight.shape[0])
    count = min(states.shape[0] - fit_tokens, within(EXIT_TOKENS, budget))
    return Sample(states, blocks, fit_tokens, count)


def within(bounds: tuple[int, int], value: int) -> int:
    """The value, or the bound that it is beyond."""
    least, most = bounds
    return max(least, min(value, most))
