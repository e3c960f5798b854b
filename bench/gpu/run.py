"""What the benchmarks of GPU backends share: options, and one result file over all shapes."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.commit import commit
from bench.gpu.clock import copy_bandwidth
from bench.gpu.machine import nvidia_smi
from bench.gpu.shapes import PRECISION, SHAPES
from bench.gpu.steps import ROUNDS, WARMUP
from ojfa_export.backends.backend import Backend
from ojfa_export.backends.cuda.device import Device, the_device
from ojfa_export.models.precision import Precision
from ojfa_export.system.atomic import write_atomically

MeasureShape = Callable[[Device, str, Path, argparse.Namespace], dict[str, Any]]


def run(
    arguments: Sequence[str] | None,
    description: str,
    backend: Backend,
    measure_shape: MeasureShape,
    batch: Sequence[int],
    precisions: Sequence[Precision] = (),
    weights: Sequence[str] = (),
    caches: Sequence[str] = (),
) -> None:
    """Measures the shapes that are asked for; writes the file after each.

    Args:
        arguments: Of the command line.
        description: Of the command.
        backend: That is measured, whose versions are told.
        measure_shape: Measures one, in a directory of its own.
        batch: Sizes by default.
        precisions: That there is a choice of.
        weights: That matrices may be quantised to.
        caches: That keys and values may be kept in, rather than as precision says.
    """
    parser = _parser(description, batch)
    if precisions:
        parser.add_argument("--precision", choices=precisions, default=PRECISION)
    if weights:
        parser.add_argument("--weights", choices=weights)
        parser.add_argument("--group-size", type=int, default=128)
    if caches:
        parser.add_argument("--cache", choices=caches)
    options = parser.parse_args(arguments)
    device = the_device()
    result: dict[str, Any] = {
        "commit": options.commit,
        "machine": {**backend.versions(), "nvidia_smi": nvidia_smi()},
        "copy_bytes_per_second": copy_bandwidth(device),
        "settings": {
            "tokens": options.tokens,
            "warmup": WARMUP,
            "rounds": ROUNDS,
            "precision": getattr(options, "precision", PRECISION),
            "weights": getattr(options, "weights", None),
            "cache": getattr(options, "cache", None),
        },
        "shapes": [],
    }
    print(f"{device.name}: copies {result['copy_bytes_per_second'] / 1e12:.2f} TB/s", flush=True)
    for name in options.shapes:
        with tempfile.TemporaryDirectory(prefix="ojfa-gpu-") as folder:
            result["shapes"].append(measure_shape(device, name, Path(folder), options))
            write_atomically(options.out, (json.dumps(result) + "\n").encode())


def _parser(description: str, batch: Sequence[int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama2-7b"])
    parser.add_argument("--past", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[*batch])
    parser.add_argument("--tokens", type=int, default=40, help="timed tokens of a setting, a round")
    parser.add_argument("--commit", default=commit(), help="where this is no checkout")
    parser.add_argument("--exits", type=int, nargs="*", help="default: all")
    return parser
