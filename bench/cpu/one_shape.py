"""Races one shape, in a process of its own: `python -m bench.cpu.one_shape demo --out demo.json`.

A process of its own, because thread pools and resident weights of one shape would disturb the
next one's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.cpu.compiled import Compiled, compile_checkpoint
from bench.cpu.contestants import Chain, Contestant, Genai, Monolithic, Transformers
from bench.cpu.overhead import TimedEngines, measure_overhead
from bench.cpu.race import race
from bench.cpu.shapes import MAX_POSITIONS, SHAPES, make_checkpoint
from ojfa_export.backends.onnxruntime.session import share_thread_pool
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.traffic import decode_bytes, folded_head_bytes
from ojfa_export.runtime.session import Session

WARMUP_TOKENS = 3
GENAI_FAMILIES = ("llama", "phi3")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Races one shape against its peers.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--past", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each contestant")
    parser.add_argument("--burst", type=int, default=30, help="timed tokens of a burst")
    parser.add_argument(
        "--exits", type=int, nargs="*", help="exits to race besides full depth; default: all"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ojfa-bench-") as folder:
        result = _measure(options, Path(folder))
    options.out.write_text(json.dumps(result))


def _measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    threads = share_thread_pool()
    checkpoint = directory / "checkpoint"
    _say(options.shape, "making the checkpoint")
    make_checkpoint(SHAPES[options.shape], checkpoint)
    _say(options.shape, "exporting it")
    compiled = compile_checkpoint(checkpoint, directory / "compiled", MAX_POSITIONS)
    contestants = _contestants(compiled, checkpoint, directory, threads, options.exits)
    races = {}
    for past in options.past:
        _say(options.shape, f"decoding after {past} tokens")
        races[str(past)] = _race(contestants, compiled.spec, past, options)
    del contestants
    _say(options.shape, "step overhead")
    return {
        "shape": options.shape,
        "spec": compiled.spec.model_dump(mode="json"),
        "threads": threads,
        "past": races,
        "overhead": _overhead(compiled, iterations=options.rounds * 5),
    }


def _contestants(
    compiled: Compiled, checkpoint: Path, directory: Path, threads: int, exits: list[int] | None
) -> list[Contestant]:
    spec = compiled.spec
    session = Session(spec, compiled.open(), 1, MAX_POSITIONS)
    early = range(1, spec.blocks)
    depths = [exit for exit in early if not exits or exit in exits] + [spec.blocks]
    contestants: list[Contestant] = [Chain(session, depth) for depth in depths]
    contestants.append(Monolithic(compiled, directory, MAX_POSITIONS))
    contestants.append(Transformers(checkpoint, threads))
    if spec.family in GENAI_FAMILIES:
        contestants.append(Genai(checkpoint, directory, spec.blocks, MAX_POSITIONS))
    return contestants


def _race(
    contestants: Sequence[Contestant], spec: ModelSpec, past: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    prompt = np.random.default_rng(past).integers(0, spec.vocab_size, past).tolist()
    bursts: dict[str, list[list[float]]] = {contestant.name: [] for contestant in contestants}
    for name, seconds in race(contestants, prompt, options.rounds, options.burst, WARMUP_TOKENS):
        bursts[name].append([second * 1e3 for second in seconds])
    length = past + WARMUP_TOKENS + options.burst // 2
    exit_head = folded_head_bytes(spec, max(1, spec.hidden_size // 100))
    results = []
    for contestant in contestants:
        blocks, samples = contestant.blocks, bursts[contestant.name]
        # Only the chain has exits: for the others, all blocks and the model's own head.
        results.append(
            {
                "name": contestant.name,
                "blocks": blocks,
                **summarise(samples, decode_bytes(spec, blocks, length, exit_head)),
                "samples_ms": [[round(sample, 4) for sample in burst] for burst in samples],
            }
        )
    return results


def summarise(bursts: Sequence[Sequence[float]], bytes_touched: int) -> dict[str, float]:
    """Figures of one contestant: the median over bursts of each burst's median, in ms.

    Args:
        bursts: Milliseconds per token.
        bytes_touched: What a token must read.
    """
    median = float(np.median([np.median(burst) for burst in bursts]))
    return {
        "ms_median": median,
        "ms_p95": float(np.percentile(np.concatenate(bursts), 95)),
        "tokens_per_second": 1e3 / median,
        "bytes_touched": bytes_touched,
        "bytes_per_second": bytes_touched / (median / 1e3),
    }


def _overhead(compiled: Compiled, iterations: int) -> dict[str, Any]:
    engines = TimedEngines(compiled.spec, compiled.weights, compiled.engines, compiled.rotary)
    overhead = measure_overhead(engines, prompt_length=128, iterations=iterations)
    samples = {str(e): [round(s, 2) for s in each] for e, each in overhead.samples_us.items()}
    return {
        "per_token_us": overhead.per_token_us,
        "per_block_us": overhead.per_block_us,
        "samples_us": samples,
    }


def _say(shape: str, what: str) -> None:
    print(f"{shape}: {what}", flush=True)


if __name__ == "__main__":
    main()
