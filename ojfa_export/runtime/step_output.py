"""What a step of a session gives: logits, or tokens chosen from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.decoding.head_output import HeadOutput, HostHeadOutput
from ojfa_export.runtime.steps import C
from ojfa_export.runtime.steps import Step as RunningStep


@dataclass(frozen=True)
class Step:
    """What `Session.decide` gave.

    Attributes:
        logits: [sequences, V] of the head that each sequence stopped at; zero for sequences
            without new tokens.
        blocks_run: [sequences] blocks run; 0 for sequences without new tokens.
        confidence: [exits of the policy, sequences] float64, NaN where the head wasn't asked.
    """

    logits: Float32
    blocks_run: Int32
    confidence: NDArray[np.float64]

    @classmethod
    def of(
        cls, step: RunningStep[HostHeadOutput], batch_size: int, vocab_size: int, exits: int
    ) -> Step:
        """What a finished step gave, of so many exits that were checked."""
        logits = np.zeros((batch_size, vocab_size), np.float32)
        blocks_run = np.zeros(batch_size, np.int32)
        for row in step.rows:
            assert row.output is not None
            logits[row.sequence.slot] = row.output.logits[row.index]
            blocks_run[row.sequence.slot] = row.depth
        return cls(logits, blocks_run, _confidence(step, batch_size, exits))


@dataclass(frozen=True)
class Choice:
    """What `Session.choose` gave.

    Attributes:
        tokens: [sequences] each sequence's next token; -1 for sequences without new tokens.
        blocks_run: [sequences] blocks run; 0 for sequences without new tokens.
        confidence: As of `Step`.
    """

    tokens: list[int]
    blocks_run: list[int]
    confidence: NDArray[np.float64]

    @classmethod
    def of(cls, step: RunningStep[HeadOutput], batch_size: int) -> Choice:
        """What a finished step gave."""
        tokens, blocks_run, exits = [-1] * batch_size, [0] * batch_size, 0
        for row in step.rows:
            assert row.output is not None
            tokens[row.sequence.slot] = row.output.tokens()[row.index]
            blocks_run[row.sequence.slot] = row.depth
            exits = len(row.stages) - 1
        return cls(tokens, blocks_run, _confidence(step, batch_size, exits))


def _confidence(step: RunningStep[C], batch_size: int, exits: int) -> NDArray[np.float64]:
    table = np.empty((exits, batch_size))
    if exits:
        table.fill(np.nan)
        for row in step.rows:
            table[: len(row.confidence), row.sequence.slot] = row.confidence
    return table
