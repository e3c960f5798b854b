"""Running one block's engine in the ways in which a session runs it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ojfa_export.backends.backend import Engines, Float32


def engine_in_pieces(
    engines: Engines, block: int, hidden: Float32, *, long_context: bool
) -> list[Float32]:
    """A block's output [B,S,H] in one piece; and in three, the last one decode step of all rows.

    Args:
        engines: The opened engines.
        block: Which block.
        hidden: [B,S,H], the block's input from position 0 on.
        long_context: Whether LongRoPE's long factors apply.
    """
    batch, length, _ = hidden.shape
    results = []
    for bounds in ((0, length), (0, length // 2, length - 1, length)):
        cache = engines.new_cache(batch, length)
        result = np.empty_like(hidden)
        for start, stop in pairwise(bounds):
            together = batch if stop - start == 1 else 1
            for row in range(0, batch, together):
                rows = slice(row, row + together)
                piece = cache.run_blocks(
                    range(block, block + 1),
                    np.ascontiguousarray(hidden[rows, start:stop]),
                    rows,
                    [start] * together,
                    long_context=long_context,
                )
                result[rows, start:stop] = np.asarray(piece)
        results.append(result)
    return results
