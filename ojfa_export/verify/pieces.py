"""Running one engine at a time, a block in the ways in which a session runs it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.system.heap import trim_heap


def engine_in_pieces(
    engines: Engines, block: int, hidden: Float32, *, long_context: bool
) -> list[Float32]:
    """A block's output [B,S,H] in one piece; and in three, the last of them a decode step.

    The block is closed afterwards: beside it the reference has weights of its own.

    Args:
        engines: The opened engines.
        block: Which block.
        hidden: [B,S,H], the block's input from position 0 on.
        long_context: Whether LongRoPE's long factors apply.
    """
    batch, length, _ = hidden.shape
    ways = (0, length), (0, length // 2, length - 1, length)
    results, executors = [], [engines.executor(batch, length) for _ in ways]
    for executor, bounds in zip(executors, ways, strict=True):
        result = np.empty_like(hidden)
        for start, stop in pairwise(bounds):
            piece = executor.run(
                range(block, block + 1),
                np.ascontiguousarray(hidden[:, start:stop]).reshape(-1, hidden.shape[-1]),
                [Chunk(slot, start, stop - start) for slot in range(batch)],
                long_context=long_context,
            )
            result[:, start:stop] = np.asarray(piece).reshape(batch, stop - start, -1)
        results.append(result)
    for executor in executors:
        executor.unload(block)
    trim_heap()
    return results


def embed_batch(engines: Engines, token_ids: Int32) -> Float32:
    """The embedding of [B,S] tokens from position 0 on, [B,S,H]."""
    batch, length = token_ids.shape
    chunks = [Chunk(slot, 0, length) for slot in range(batch)]
    hidden = engines.executor(batch, length).embed(token_ids.reshape(-1).tolist(), chunks)
    return np.asarray(hidden).reshape(batch, length, -1)
