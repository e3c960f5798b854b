"""The comparison on the CPU: `python -m bench.cpu.compare --out bench/results/cpu.json`.

Every shape runs in a process of its own (see one_shape.py); the raw samples, the machine and the
bars end up in one JSON file, a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cpu.bars import Bar, bars
from bench.cpu.plot import plot_races
from bench.cpu.shapes import SHAPES
from ojfa_export.planning.bandwidth import read_bandwidth
from ojfa_export.planning.machine import PACKAGES, describe_machine
from ojfa_export.system.atomic import write_atomically

PEERS = ("onnx", "torch", "transformers", "onnxruntime-genai")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Races every shape against its peers.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a .png comes beside it")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--past", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=30, help="bursts of each contestant")
    parser.add_argument("--burst", type=int, default=30, help="timed tokens of a burst")
    parser.add_argument(
        "--exits", type=int, nargs="*", help="exits to race besides full depth; default: all"
    )
    options = parser.parse_args(arguments)
    print("memory bandwidth", flush=True)
    bandwidth = read_bandwidth()
    shapes = [_run_shape(shape, options) for shape in options.shapes]
    add_bandwidth_share(shapes, bandwidth)
    verdicts = [bar for shape in shapes for bar in bars(shape)]
    result = {
        "commit": _commit(),
        "machine": {
            **describe_machine((*PACKAGES, *PEERS)),
            "bandwidth_bytes_per_second": bandwidth,
        },
        "settings": {"past": options.past, "rounds": options.rounds, "burst": options.burst},
        "bars": [bar.to_json() for bar in verdicts],
        "shapes": shapes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, (json.dumps(result) + "\n").encode())
    plot_races(shapes, options.out.with_suffix(".png"))
    print_races(shapes)
    print_bars(verdicts)


def _commit() -> str:
    """The commit that is measured; "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _run_shape(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.cpu.one_shape", shape, "--out", str(out)]
        command += ["--rounds", str(options.rounds), "--burst", str(options.burst)]
        command += ["--past", *map(str, options.past)]
        if options.exits:
            command += ["--exits", *map(str, options.exits)]
        subprocess.run(command, check=True)
        result: dict[str, Any] = json.loads(out.read_text())
    return result


def add_bandwidth_share(shapes: Sequence[dict[str, Any]], bandwidth: float) -> None:
    """Adds to every contestant the share of the measured read bandwidth that it reaches."""
    for shape in shapes:
        for contestants in shape["past"].values():
            for each in contestants:
                each["bandwidth_share"] = each["bytes_per_second"] / bandwidth


def print_races(shapes: Sequence[dict[str, Any]]) -> None:
    """Prints every contestant's figures."""
    for shape in shapes:
        for past, contestants in shape["past"].items():
            print(f"\n{shape['shape']}, {past} tokens in the cache")
            print(f"  {'':20} {'blocks':>6} {'ms':>9} {'p95':>9} {'tokens/s':>9} {'bandwidth':>9}")
            for each in contestants:
                print(
                    f"  {each['name']:20} {each['blocks']:6} {each['ms_median']:9.3f} "
                    f"{each['ms_p95']:9.3f} {each['tokens_per_second']:9.1f} "
                    f"{each['bandwidth_share']:9.1%}"
                )


def print_bars(verdicts: Sequence[Bar]) -> None:
    """Prints every bar with its verdict."""
    print()
    for bar in verdicts:
        past = "" if bar.past is None else f"past {bar.past}"
        sign = "<=" if bar.at_most else ">="
        print(
            f"{bar.verdict:12} {bar.shape:15} {past:9} {bar.what:50} "
            f"{bar.value:8.3f} {sign} {bar.limit:g}"
        )


if __name__ == "__main__":
    main()
