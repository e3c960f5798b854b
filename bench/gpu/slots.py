"""Steps of sequences in any slots of the KV cache: `python -m bench.gpu.slots --out slots.json`.

What the engine for services runs: one token of each sequence, at Llama-2-7B's shape with random
weights in fp16, on the TensorRT backend. Sequences fill all slots, or every second one, or change
from step to step; a step begins when its tokens are known, or before ("following").
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from bench.gpu.machine import nvidia_smi
from bench.gpu.shapes import SHAPES, RandomGraphs
from bench.gpu.tensorrt import build
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import UNKNOWN, Sequence

WARMUP, SPARE = 4, 96
REQUEST = HeadRequest()


def main(arguments: Many[str] | None = None) -> None:
    """Times every number of sequences and writes one JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    options = parser.parse_args(arguments)
    spec = SHAPES["llama2-7b"]
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": {**BACKEND.versions(), "nvidia_smi": nvidia_smi()},
        "settings": {"past": options.past, "tokens": options.tokens, "rounds": options.rounds},
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="ojfa-gpu-") as folder:
        directory = Path(folder)
        graphs = RandomGraphs(spec, directory / "graphs", options.past + SPARE)
        graphs.write()
        plans, _ = build(spec, directory)
        engines = BACKEND.open_engines(spec, directory / "graphs", plans, graphs.rotary)
        assert isinstance(engines, TensorRtEngines)
        engines.load_blocks(spec.blocks)
        engines.device.synchronize()
        for count in options.sequences:
            result["rows"] += measure(spec, engines, count, options)
            options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


def measure(
    spec: ModelSpec, engines: TensorRtEngines, count: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of so many sequences, all ways taking turns."""
    engines.device.recorder.clear()
    capacity = options.past + SPARE
    dense = ModelRunner(spec, engines, count, capacity)
    sparse = ModelRunner(spec, engines, 2 * count, capacity)
    every = filled(dense, range(count), options.past)
    even = filled(sparse, range(0, 2 * count, 2), options.past)
    odd = filled(sparse, range(1, 2 * count, 2), options.past)
    ways: dict[str, tuple[ModelRunner, list[list[Sequence]], bool]] = {
        "all slots": (dense, [every], False),
        "every second slot": (sparse, [odd], False),
        "slots that change each step": (sparse, [even, odd], False),
        "all slots, following": (dense, [every], True),
        "every second slot, following": (sparse, [odd], True),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (runner, sets, following) in ways.items():
            samples[name] += steps(runner, sets, following, options.tokens)
            for sequence in (each for group in sets for each in group):
                sequence.truncate(options.past)
    medians = {name: float(np.median(each)) for name, each in samples.items()}
    print(count, {name: round(median, 3) for name, median in medians.items()}, flush=True)
    return [
        {"sequences": count, "slots": name, "ms_median": medians[name], "samples": each}
        for name, each in samples.items()
    ]


def filled(runner: ModelRunner, slots: Many[int], past: int) -> list[Sequence]:
    """New sequences in these slots, with random tokens."""
    rng, blocks = np.random.default_rng(3), runner.spec.blocks
    made = []
    for slot in slots:
        sequence = Sequence(slot, blocks)
        sequence.append(rng.integers(0, runner.spec.vocab_size, past).tolist())
        runner.choose([sequence], blocks, REQUEST).tokens()
        made.append(sequence)
    return made


def steps(
    runner: ModelRunner, sets: list[list[Sequence]], following: bool, count: int
) -> list[float]:
    """Milliseconds of each step; the sets take turns."""
    samples: list[float] = []
    output: HeadOutput | None = None
    tokens = {sequence.slot: 1 for group in sets for sequence in group}
    start = time.perf_counter()
    for turn in range(WARMUP + count):
        group = sets[turn % len(sets)]
        if following and output is not None:
            output = _follow(runner, group, output)
        else:
            start = time.perf_counter() if not following else start
            for sequence in group:
                sequence.append([tokens[sequence.slot]])
            output = runner.choose(group, runner.spec.blocks, REQUEST)
        if not following:
            for sequence, token in zip(group, output.tokens(), strict=True):
                tokens[sequence.slot] = token
        now = time.perf_counter()
        if turn >= WARMUP:
            samples.append((now - start) * 1e3)
        start = now
    assert output is not None
    output.tokens()
    return samples


def _follow(runner: ModelRunner, group: list[Sequence], before: HeadOutput) -> HeadOutput:
    """Begins a step before the tokens of the one before are on the host, then waits for those."""
    for sequence in group:
        sequence.append([UNKNOWN])
    output = runner.choose(group, runner.spec.blocks, REQUEST, before)
    for sequence, token in zip(group, before.tokens(), strict=True):
        sequence.tokens[-1] = token
    return output


if __name__ == "__main__":
    main()
