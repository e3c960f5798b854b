"""Latency on an NVIDIA GPU: `python -m bench.gpu.tensorrt --out bench/results/gpu.json`.

Times the TensorRT backend at the shapes of published models with random weights: every exit, batch
sizes, lengths of the cache, prefill, and the parts of a step. Written to one JSON file with the
machine, versions, commit and raw samples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.clock import graph_time
from bench.gpu.run import run
from bench.gpu.shapes import SHAPES, RandomGraphs
from bench.gpu.steps import ROUNDS, WARMUP, checks, decoding, host_work, prefill
from ojfa_export.backends.backend import Backend
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.mailbox import HeadArguments
from ojfa_export.backends.narrow_cache import with_cache
from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.backends.tensorrt.blocks import Block
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.backends.tensorrt.workspace import Workspace
from ojfa_export.bundle.names import graph_names
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session

PREFILL = CHECKED_PAST = 512
# Positions beyond those that are timed: recordings are replayed to time them, and each moves on.
SPARE = 256


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        arguments,
        "Times the TensorRT backend on this GPU.",
        BACKEND,
        measure_shape,
        batch=(1, 4, 16),
        precisions=("fp16", "bf16"),
        weights=("int4", "int8", "fp8"),
        caches=("fp8",),
    )


def measure_shape(
    device: Device, name: str, directory: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Builds a shape's engines and times them."""
    spec = SHAPES[name]
    length = max(options.past) + options.tokens + 2 * WARMUP + SPARE
    form = None
    if options.weights is not None:
        form = WeightFormat(
            storage=options.weights,
            group_size=options.group_size,
            zero_points=options.weights != "fp8",
        )
    graphs = RandomGraphs(spec, directory / "graphs", length, options.precision, form)
    graphs.write()
    backend = with_cache(BACKEND, options.cache, options.precision)
    plans, seconds = build(spec, directory, backend)
    print(f"{name}: built in {sum(seconds.values()):.0f} s: {seconds}", flush=True)
    engines = BACKEND.open_engines(spec, directory / "graphs", plans, graphs.rotary)
    assert isinstance(engines, TensorRtEngines)
    start = time.perf_counter()
    engines.load_blocks(spec.blocks)
    device.synchronize()
    loading = time.perf_counter() - start
    print(f"{name}: weights loaded in {loading:.1f} s", flush=True)
    rows = []
    for batch in options.batch:
        for kernels in ways(engines):
            engines.decode_kernels = kernels
            engines.device.recorder.clear()
            rows += decode(engines, spec, batch, options, length)
    return {
        "shape": name,
        "spec": spec.model_dump(mode="json"),
        "build_seconds": seconds,
        "load_seconds": loading,
        "decode": rows,
        "prefill": [prefill(engines, spec, PREFILL, prompts) for prompts in (1, 16)],
        "parts_us": parts(engines, spec),
        **beside_kernels(engines, spec, options, length),
    }


def beside_kernels(
    engines: TensorRtEngines, spec: ModelSpec, options: argparse.Namespace, length: int
) -> dict[str, Any]:
    """What the host adds to a token, and what checks after every block do, batch 1."""
    session = Session(spec, engines, 1, length)
    past = CHECKED_PAST if CHECKED_PAST in options.past else options.past[0]
    session.advance(np.random.default_rng(1).integers(0, spec.vocab_size, past).tolist())
    return {
        "host_us": host_work(session, engines, past, options.tokens),
        "checks": checks(session, past, options.tokens),
    }


def build(
    spec: ModelSpec, directory: Path, backend: Backend = BACKEND
) -> tuple[dict[str, Path], dict[str, float]]:
    """Builds all engines; the seconds of each that took any."""
    plans, seconds = {}, {}
    (directory / "engines").mkdir()
    for name in graph_names(spec.blocks):
        plans[name] = directory / "engines" / f"{name}.json"
        start = time.perf_counter()
        backend.build_engine(spec, directory / "graphs" / f"{name}.onnx", plans[name])
        taken = time.perf_counter() - start
        if taken > 1:
            seconds[name] = round(taken, 2)
    return plans, seconds


def decode(
    engines: TensorRtEngines, spec: ModelSpec, batch: int, options: argparse.Namespace, length: int
) -> list[dict[str, Any]]:
    """Milliseconds per token of every exit and past length."""
    session = Session(spec, engines, batch, length)
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for past in options.past:
        for sequence in range(batch):
            session.rewind(0, sequence)
        session.advance(rng.integers(0, spec.vocab_size, (batch, past)).tolist())
        exits = [e for e in options.exits or range(1, spec.blocks + 1) if e <= spec.blocks]
        samples_of: dict[int, list[float]] = {exit: [] for exit in exits}
        for _ in range(ROUNDS):
            for exit in exits:
                samples_of[exit] += decoding(session, exit, past, options.tokens)
        for exit, samples in samples_of.items():
            rows.append(
                {
                    "decode": "kernels" if engines.decode_kernels else "engines",
                    "batch": batch,
                    "past": past,
                    "blocks": exit,
                    "ms_median": float(np.median(samples)),
                    "ms_p95": float(np.percentile(samples, 95)),
                    "samples_ms": [round(sample, 4) for sample in samples],
                }
            )
        shown = ", ".join(f"{r['blocks']}: {r['ms_median']:.3f}" for r in rows[-len(exits) :])
        print(f"{rows[-1]['decode']} batch {batch} past {past}: {shown}", flush=True)
    return rows


def ways(engines: TensorRtEngines) -> tuple[bool, ...]:
    """What steps run in: our kernels, and TensorRT's engines where there are any."""
    return (True, False) if engines.has_engines else (True,)


def parts(engines: TensorRtEngines, spec: ModelSpec) -> dict[str, float]:
    """Microseconds of a block and of its parts, each over all blocks in one CUDA graph."""
    slots, length = 64, 1024
    cache = KvCache(engines, slots, length)
    cache.pages.make_ready([Chunk(slot, 0, length) for slot in range(slots)])
    blocks = [Block(engines, index, cache) for index in range(spec.blocks)]
    results: dict[str, float] = {}

    def measure(name: str, work: Callable[[Block], None]) -> None:
        def chain() -> None:
            for block in blocks:
                work(block)

        results[name] = graph_time(engines.device, chain) / spec.blocks

    for tokens in (1, 2, 4, 8, 16, 32, 64):
        space = workspace(engines, tokens, 512)
        if engines.has_engines:
            measure(f"qkv by engine {tokens}", partial(Block._qkv_by_engine, workspace=space))
            measure(f"mlp by engine {tokens}", partial(Block._mlp_by_engine, workspace=space))
        if products := engines.products(tokens):
            measure(
                f"qkv by kernels {tokens}",
                partial(Block._qkv_by_kernels, workspace=space, products=products),
            )
            measure(
                f"mlp by kernels {tokens}",
                partial(Block._mlp_by_kernels, workspace=space, products=products),
            )
        measure(
            f"attention past 512 {tokens}",
            partial(Block._attend, workspace=space, long_context=False),
        )
    for past in (128, 512, 1000):
        space = workspace(engines, 1, past)
        for kernels in reversed(ways(engines)):
            engines.decode_kernels = kernels
            how = "kernels" if engines.decode_kernels else "engines"
            measure(
                f"block by {how} past {past}",
                partial(Block.run, workspace=space, long_context=False),
            )
    results |= head_times(engines, spec)
    for name, value in results.items():
        print(f"  {name}: {value:.1f} us", flush=True)
    return results


def workspace(engines: TensorRtEngines, tokens: int, past: int) -> Workspace:
    """Buffers of a step in which each sequence has this many tokens behind it."""
    result = Workspace(engines, tokens)
    result.place([Chunk(slot, past, 1) for slot in range(tokens)])
    for buffer in result.hidden:
        engines.device.clear(buffer.pointer, buffer.nbytes)
    return result


def head_times(engines: TensorRtEngines, spec: ModelSpec) -> dict[str, float]:
    """Microseconds of the heads, logits left on the device, and of checks: a head and a choice."""
    results = {}
    asked = HeadArguments.of(HeadRequest())
    for kernels in ways(engines):
        engines.decode_kernels = kernels
        engines.device.recorder.clear()
        for final in (True, False):
            engines._heads.clear()
            hidden = engines.arrays.asarray(np.ones((1, spec.hidden_size), np.float32))
            blocks_run = spec.blocks if final else 1
            engines.logits(hidden, blocks_run)
            [head] = engines._heads.values()
            which, how = "final" if final else "exit", "kernels" if kernels else "engine"
            logits = engines._logits[:1]
            works = {
                f"{which} head by {how}": partial(head.run, hidden, logits),
                f"{which} check by {how}": partial(head.choose, hidden, logits, asked),
            }
            for name, each in works.items():

                def work(each: Callable[[], None] = each) -> None:
                    for _ in range(20):
                        each()

                results[name] = graph_time(engines.device, work) / 20
            engines.mailbox.reset()  # nobody reads these answers
    engines.decode_kernels = True
    engines._heads.clear()
    engines.device.recorder.clear()
    return results


if __name__ == "__main__":
    main()
