"""A block's products alone, by number of tokens: `python -m bench.gpu.products`.

Needs no TensorRT: kernels and random weights, those of all blocks in one CUDA graph, each of which
has its own memory. Prints microseconds of each product, with its norm, and the share of a copy's
bandwidth that it reads the matrix with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.gpu.attention import ALL_SHAPES, FORMATS, Bench, Row, Weights, run_all
from bench.gpu.clock import copy_bandwidth, graph_time
from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.tensorrt.linear import Norm
from ojfa_export.backends.tensorrt.matrices import DeviceMatrix, Matrix


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times the products' kernels on this GPU.")
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, default=["llama2-7b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16])
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--weights", choices=FORMATS, help="of the blocks; fp16 unless given")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    device = the_device()
    copied = copy_bandwidth(device)
    print(f"{device.name}: copies {copied / 1e12:.2f} TB/s", flush=True)
    rows: list[Row] = []
    for name in options.shapes:
        bench = Bench(device, ALL_SHAPES[name], options.blocks, FORMATS.get(options.weights))
        weights = [bench.weights() for _ in range(options.blocks)]
        for tokens in options.tokens:
            for row in products(bench, weights, tokens):
                row |= {"shape": name, "share": row["bytes"] / (row["us"] * 1e-6) / copied}
                shown = "{shape}, {tokens}: {what} {us:.2f} us, {share:.0%}".format(**row)
                print(shown, flush=True)
                rows.append(row)
    if options.out:
        described = {"gpu": device.name, "copy_bytes_per_second": copied, "rows": rows}
        options.out.write_text(json.dumps(described, indent=1) + "\n")


def products(bench: Bench, weights: list[Weights], tokens: int) -> list[Row]:
    """Of each of a block's matrices."""
    spec, arrays = bench.spec, bench.arrays
    kernels = bench.products(tokens)
    rng = np.random.default_rng(2)
    hidden = arrays.asarray(rng.standard_normal((tokens, spec.hidden_size), np.float32))
    norm = Norm(arrays.asarray(np.ones(spec.hidden_size, np.float32)), None, 1e-5)
    qkv = arrays.empty((tokens, weights[0]["qkv"].shape[0]), np.float32)
    mixed, inner = (
        arrays.upload(rng.standard_normal((tokens, width), np.float32).astype(np.float16))
        for width in (spec.heads * spec.head_dim, spec.intermediate_size)
    )
    ways = {
        "qkv": lambda matrix: kernels.norm_linear(qkv, hidden, norm, matrix, None),
        "out": lambda matrix: kernels.linear(hidden, hidden, mixed, matrix, None),
        "up": lambda matrix: kernels.norm_up(inner, hidden, norm, matrix, None),
        "down": lambda matrix: kernels.linear(hidden, hidden, inner, matrix, None),
    }
    rows: list[Row] = []
    for what, way in ways.items():
        works = [partial(way, each[what]) for each in weights]
        us = graph_time(bench.device, partial(run_all, works)) / len(weights)
        rows.append({"what": what, "tokens": tokens, "us": us, "bytes": _bytes(weights[0][what])})
    total = {key: sum(row[key] for row in rows) for key in ("us", "bytes")}
    return [*rows, {"what": "all", "tokens": tokens, **total}]


def _bytes(matrix: Matrix) -> int:
    return (matrix.array if isinstance(matrix, DeviceMatrix) else matrix).nbytes


if __name__ == "__main__":
    main()
