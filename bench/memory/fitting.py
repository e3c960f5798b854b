"""What fitting int4 weights takes: seconds and peak memory of each graph's export.

    python -m bench.memory.published llama-2-7b --blocks 2 -o llama
    python -m bench.memory.fitting llama -o graphs --blocks 1

Nothing but the graphs is made, in a directory of their own; with `--blocks 0` the head is fitted
to embeddings, which takes as much. Prints one line of JSON a graph; Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures fitting weights of four bits.")
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--blocks", type=int, default=1, help="so many of the first")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True)
    build = BuildOptions(checkpoint=options.checkpoint, output=options.output, weights="int4")
    exporter = Inputs(build).exporter(options.output)
    measure("embed", exporter.embed)
    for index in range(options.blocks):
        measure(f"block {index}", partial(exporter.block, index))
    measure("head", exporter.final_head)


def measure(name: str, export: Callable[[], None]) -> None:
    """Prints what a step took, and the process's peak up to its end."""
    start = time.perf_counter()
    export()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(json.dumps({"name": name, "seconds": seconds, "peak_memory_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
