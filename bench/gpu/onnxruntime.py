"""ONNX Runtime's CUDA provider on an NVIDIA GPU.

python -m bench.gpu.onnxruntime --out gpu-ort.json

Times the onnxruntime-cuda backend as bench.gpu.tensorrt times TensorRT's: the same shapes,
settings, steps and format. Run it beside bench.gpu.tensorrt, on the same machine, with
onnxruntime-gpu installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.run import run
from bench.gpu.shapes import SHAPES, RandomGraphs
from bench.gpu.steps import ROUNDS, WARMUP, decoding, prefill
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.onnxruntime_cuda.backend import BACKEND
from ojfa_export.backends.onnxruntime_cuda.engines import OnnxRuntimeCudaEngines
from ojfa_export.bundle.names import graph_names
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session

PREFILL = 512
# Steps as recorded CUDA graphs, and as ONNX Runtime puts its kernels on the stream.
RECORDED = {"onnxruntime-cuda": True, "onnxruntime-cuda, no graph": False}


def main(arguments: Sequence[str] | None = None) -> None:
    run(arguments, "Times ONNX Runtime's CUDA provider.", BACKEND, measure_shape, batch=(1,))


def measure_shape(
    device: Device, name: str, directory: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Builds a shape's engines and times them."""
    spec = SHAPES[name]
    length = max(options.past) + options.tokens + 2 * WARMUP
    graphs = RandomGraphs(spec, directory / "graphs", length)
    graphs.write()
    start = time.perf_counter()
    plans = build(spec, directory)
    building = time.perf_counter() - start
    engines = BACKEND.open_engines(spec, directory / "graphs", plans, graphs.rotary)
    assert isinstance(engines, OnnxRuntimeCudaEngines)
    start = time.perf_counter()
    engines.load_blocks(spec.blocks)
    device.synchronize()
    loading = time.perf_counter() - start
    print(f"{name}: built in {building:.1f} s, loaded in {loading:.1f} s", flush=True)
    rows = []
    for batch in options.batch:
        session = Session(spec, engines, batch, length)
        for past in options.past:
            rows += decode(engines, session, past, options)
    engines.record = True
    return {
        "shape": name,
        "spec": spec.model_dump(mode="json"),
        "build_seconds": building,
        "load_seconds": loading,
        "decode": rows,
        "prefill": [prefill(engines, spec, PREFILL)],
    }


def build(spec: ModelSpec, directory: Path) -> dict[str, Path]:
    """Builds all engines."""
    plans = {}
    (directory / "engines").mkdir()
    for name in graph_names(spec.blocks):
        plans[name] = directory / "engines" / f"{name}.json"
        BACKEND.build_engine(spec, directory / "graphs" / f"{name}.onnx", plans[name])
    return plans


def decode(
    engines: OnnxRuntimeCudaEngines, session: Session, past: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds per token of the exits after `past` tokens, recorded or not; turns by exit."""
    blocks = session.spec.blocks
    for sequence in range(session.batch_size):
        session.rewind(0, sequence)
    ids = np.random.default_rng(1).integers(0, session.spec.vocab_size, (session.batch_size, past))
    session.advance(ids.tolist())
    rows: list[dict[str, Any]] = []
    exits = [each for each in options.exits or range(1, blocks + 1) if each <= blocks]
    samples_of: dict[tuple[int, str], list[float]] = {
        (exit, name): [] for exit in exits for name in RECORDED
    }
    for _ in range(ROUNDS):
        for exit in exits:
            for name, engines.record in RECORDED.items():
                samples_of[exit, name] += decoding(session, exit, past, options.tokens)
    for (exit, name), samples in samples_of.items():
        rows.append(
            {
                "decode": name,
                "batch": session.batch_size,
                "past": past,
                "blocks": exit,
                "ms_median": float(np.median(samples)),
                "ms_p95": float(np.percentile(samples, 95)),
                "samples_ms": [round(sample, 4) for sample in samples],
            }
        )
    for name in RECORDED:
        shown = ", ".join(
            f"{r['blocks']}: {r['ms_median']:.3f}" for r in rows if r["decode"] == name
        )
        print(f"{name} batch {session.batch_size} past {past}: {shown}", flush=True)
    return rows


if __name__ == "__main__":
    main()
