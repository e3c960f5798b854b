"""How sure an exit is of tokens that have stopped there, as a policy would ask it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.checks import checking
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure, confidence
from ojfa_export.errors import UsageError
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence


def exit_confidence(
    runner: ModelRunner, sequence: Sequence, logits: Float32, depth: int, measure: Measure
) -> NDArray[np.float64]:
    """The exit head's confidence, or the check head's, where there is one.

    Args:
        runner: Of the sequence.
        sequence: Whose newest tokens have just stopped there.
        logits: [n, V] of the exit head, or of the model's own.
        depth: Blocks run.
        measure: Of confidence.

    Returns:
        [n] float64.

    Raises:
        UsageError: The newest n tokens have not stopped there.
    """
    checks = checking(runner.engines)
    if checks is None or depth == runner.spec.blocks:
        return confidence(logits, measure)
    start, states = len(sequence) - len(logits), runner.pending.get(depth)
    if states is None or start < 0 or sequence.marks[depth - 1] < len(sequence):
        raise UsageError(
            f"the newest {len(logits)} tokens have not stopped at exit {depth}",
            hint="ask right after 'advance' or 'deepen' to it",
        )
    chunks = [Chunk(sequence.slot, start, len(logits))]
    hidden = runner.executor.load(states, chunks)
    if runner.exits is not None:  # writes the keys and values that it has written before
        hidden = runner.exits.executor.run(
            depth, hidden, chunks, long_context=sequence.long_context
        )
    return confidence(checks.check_logits(hidden, depth), measure)
