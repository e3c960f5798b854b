"""Whether the zero points of int4 weights get a fraction: decided by one matrix of the model.

A fraction costs some percent of a token's time. Of weights in general it saves little: rounding is
what they lose, by fractional zero points as by whole ones. But a checkpoint may lie on such a grid:
its weights were numbers of four bits with a scale and an offset once, as GGUF's Q4_1 and HQQ have
them, and were written out. Those come out as they are, and whole zero points miss them.
"""

from __future__ import annotations

import numpy as np

from ojfa_export.bundle.weight_format import WeightFormat, dequantise
from ojfa_export.decoding.arrays import Float32
from ojfa_export.graphs.ranges import nearest
from ojfa_export.models.checkpoint.checkpoint import Checkpoint

# The first block's, of which so many outputs are looked at.
MATRIX, OUTPUTS = "attention.out.weight", 256
# Error with fractions over that without, below which they are worth it: 0.92 to 1 of weights that
# lie on no grid (random ones, the demo), 0.01 on one (a copy of SmolLM2-135M that was Q4_1).
WORTH = 0.7
# Of weights, relative to them: a fifth of what rounding to 8 bits loses. What whole zero points
# hold this well needs no fractions.
NEGLIGIBLE = 0.001


def decide_fractions(checkpoint: Checkpoint, form: WeightFormat) -> WeightFormat:
    """What int4 weights are stored as, for a backend that runs offsets.

    Args:
        checkpoint: Whose weights they are.
        form: With whole zero points.

    Raises:
        CheckpointError: The matrix has NaN or infinity.
    """
    source = checkpoint.family.block(checkpoint.config, checkpoint.spec, 0)[MATRIX]
    columns = np.ascontiguousarray(checkpoint.read(source)[:, :OUTPUTS], np.float32)
    fractional = form.model_copy(update={"offsets": True})
    is_worth_it = _error(columns, fractional) + NEGLIGIBLE < WORTH * _error(columns, form)
    return fractional if is_worth_it else form


def _error(columns: Float32, form: WeightFormat) -> float:
    """Root mean square error of weights rounded to the nearest number, relative to theirs."""
    rounded = dequantise(nearest(columns, form), form).T
    lost, whole = (
        float(np.linalg.norm(each.astype(np.float64))) for each in (rounded - columns, columns)
    )
    return lost / whole if whole else 0.0
