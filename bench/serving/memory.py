"""What requests leave in memory: `python -m bench.serving.memory BUNDLE --out memory.json`.

Sixteen long requests run at once, and end or are cancelled half-way, several times over. The engine
keeps what they leave for requests that begin alike, up to its budget, and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import ojfa_export
from bench.serving.result import write_result
from bench.serving.throughput import TEXT
from ojfa_export.engine.budget import page_bytes
from ojfa_export.engine.engine import Engine

REQUESTS, TOKENS = 16, 600
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything, prints the figures and writes the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", type=int, default=32, metavar="MIB", help="of the KV cache")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    model = ojfa_export.load(options.bundle)
    model.engines.load_blocks(model.blocks)
    budget = options.budget * MIB // page_bytes(model.spec) * page_bytes(model.spec)
    samples = measure(model, budget, options.rounds)
    # The first round also makes what the process keeps anyway: buffers of shapes, and heaps.
    [before], [closed] = samples["before"], samples["closed"]
    first, last = samples["ended"][0], samples["cancelled"][-1]
    figures = {
        f"{REQUESTS} requests of {TOKENS} tokens: resident memory beyond before, MiB": (
            (last - before) / MIB
        ),
        "of which the cache's budget allows, MiB": budget / MIB,
        "beyond before and budget, share of the memory before": (last - before - budget) / before,
        "growth from the first round to the last, MiB": (last - first) / MIB,
        "when the engine is closed, beyond before, MiB": (closed - before) / MIB,
    }
    write_result(options.out, model, figures, {"resident_bytes": samples, "budget_bytes": budget})
    return 0


def measure(model: ojfa_export.Model, budget: int, rounds: int) -> dict[str, list[int]]:
    """Resident bytes before, after each round in both ways, and when the engine is closed."""
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:80_000]).ids
    rng = random.Random(0)
    # One short request has all blocks and heads, and the shapes of a step, in memory.
    with Engine(model, max_sequences=1) as engine:
        engine.submit(ids[:16], exit=model.blocks // 2, max_new_tokens=4, ignore_eos=True).result()
        engine.submit(ids[:16], max_new_tokens=4, ignore_eos=True).result()
    before = resident()
    ended, cancelled = [], []
    with Engine(model, max_sequences=REQUESTS, kv_cache_bytes=budget) as engine:
        for _ in range(rounds):
            run(engine, ids, rng, cancel=False)
            ended.append(resident())
            run(engine, ids, rng, cancel=True)
            cancelled.append(resident())
    return {
        "before": [before],
        "ended": ended,
        "cancelled": cancelled,
        "closed": [resident()],
    }


def run(engine: Engine, ids: Sequence[int], rng: random.Random, *, cancel: bool) -> None:
    """Half of each request's tokens are its prompt; a third of the rest where it is cancelled."""
    half = TOKENS // 2
    exits = (engine.model.blocks // 2, "full")
    requests = []
    for number in range(REQUESTS):
        start = rng.randrange(len(ids) - half)
        exit = exits[number % 2]
        requests.append(
            engine.submit(
                ids[start : start + half],
                exit=exit,  # type: ignore[arg-type]
                max_new_tokens=half,
                ignore_eos=True,
            )
        )
    for request in requests:
        if cancel:
            for count, _ in enumerate(request):
                if count == half // 3:
                    break
            request.cancel()
        request.result()


def resident() -> int:
    """Bytes of the process in memory."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
