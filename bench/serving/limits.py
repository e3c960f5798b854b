"""What the products of blocks allow, whatever the engine does: the cost of passes by themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from ojfa_export.backends.passes import Chunk
from ojfa_export.runtime.model import Model

SLOTS, CAPACITY, REPEATS = 16, 1024, 15


def pass_costs(model: Model, past: int, prompt: int) -> dict[str, float]:
    """Processor seconds of passes through all blocks, medians of passes taken in turns.

    Args:
        model: With all blocks loaded.
        past: Tokens in the cache of each sequence that decodes.
        prompt: Tokens of each prompt.

    Returns:
        By name: of "rows N", a step of N sequences; of "prompts", all slots' prompts in one pass.
    """
    executor = model.engines.executor(SLOTS, CAPACITY)
    rng = np.random.default_rng(0)
    passes = {f"rows {n}": [Chunk(slot, past, 1) for slot in range(n)] for n in (1, 4, 8, 12, 16)}
    passes["prompts"] = [Chunk(slot, 0, prompt) for slot in range(SLOTS)]
    samples: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(REPEATS):
        for name, chunks in passes.items():
            rows = sum(chunk.length for chunk in chunks)
            hidden = rng.normal(size=(rows, model.spec.hidden_size)).astype(np.float32)
            for sample in ([], samples[name]):  # the first brings the weights into the caches
                start = time.process_time()
                executor.run(range(model.blocks), hidden, chunks, long_context=False)
                sample.append(time.process_time() - start)
    return {name: statistics.median(sample) for name, sample in samples.items()}


def least_over_prediction(costs: Mapping[str, float], depths: Sequence[int]) -> float:
    """Blocks of twelve rows that get fewer with depth, over what the depths predict of twelve.

    Args:
        costs: As of `pass_costs`.
        depths: Three exits, of four requests each, shallowest first.
    """
    spans = np.diff([0, *depths])
    rows = [costs["rows 12"], costs["rows 8"], costs["rows 4"]]
    return float(spans @ rows / (np.mean(depths) * costs["rows 12"]))


def most_over_one_client(costs: Mapping[str, float], prompt: int, lengths: Sequence[int]) -> float:
    """Tokens per processor second of full passes over those of one sequence alone.

    Prompts cost what they do in one pass, tokens what they do in steps of 16; heads are left out.
    """
    count, tokens = len(lengths), sum(lengths)
    prompts = count * costs["prompts"] / SLOTS
    return float(
        (prompts + tokens * costs["rows 1"]) / (prompts + tokens * costs["rows 16"] / SLOTS)
    )
