"""Memory and start-up: what a build takes at its peak, what running takes, how soon it answers.

    python -m bench.memory.usage build -- python -m ojfa_export build CHECKPOINT -o BUNDLE
    python -m bench.memory.usage run BUNDLE --exits 6 12
    python -m bench.memory.usage first-token BUNDLE

Each prints one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.traffic import block_bytes, cache_bytes, exit_head_bytes, head_bytes

RUN_LIMIT = 1.15
FIRST_TOKEN_LIMIT_SECONDS = 1.0
SAMPLING_SECONDS = 0.02
NEW_TOKENS = 16


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures memory and start-up.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="peak memory of a command")
    build.add_argument("arguments", nargs="+", help="the command, after --")
    run = commands.add_parser("run", help="memory to run a bundle at given exits")
    run.add_argument("bundle", type=Path)
    run.add_argument("--exits", type=int, nargs="*", help="default: half and full depth")
    run.add_argument("--prompt", type=int, default=NEW_TOKENS, help="tokens of the prompt")
    first = commands.add_parser("first-token", help="from process start to the first token")
    first.add_argument("bundle", type=Path)
    first.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.command == "build":
        result: Any = peak_memory(options.arguments)
    elif options.command == "run":
        result = run_memory(options.bundle, options.exits, options.prompt)
    else:
        result = first_token(options.bundle, options.repeats)
    print(json.dumps(result, indent=1))


def peak_memory(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command and watches its memory.

    Returns:
        `peak_rss_bytes`, the kernel's own figure for the largest process of the command (mapped
        files count as far as they are resident), and `peak_anonymous_bytes`, sampled from the
        command's own process: what could not be dropped under pressure.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    start, anonymous = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
            time.sleep(SAMPLING_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # Linux counts in KiB
    return {
        "command": list(command),
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak,
        "peak_anonymous_bytes": anonymous,
    }


def status_bytes(pid: int | str, field: str) -> int:
    """A figure of the kernel's on a process (VmRSS, RssAnon) in bytes; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    values = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(next(values, "0"))


def run_memory(bundle: Path, exits: Sequence[int] | None, prompt: int) -> list[dict[str, Any]]:
    """Measures resident memory of generating at each exit, in a fresh process each.

    Args:
        bundle: The bundle.
        exits: Blocks to run; None for half of them and for all, which 0 names too.
        prompt: Tokens of the prompt.
    """
    results = []
    context = multiprocessing.get_context("spawn")
    for exit in exits or (None, 0):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(_generate_and_weigh, bundle, exit, prompt).result())
    return results


def _generate_and_weigh(bundle: Path, exit: int | None, prompt: int) -> dict[str, Any]:
    """Resident memory of this process after generating, less that of its imports.

    Args:
        bundle: The bundle.
        exit: Blocks to run; None for half of them, 0 for all.
        prompt: Tokens of the prompt.
    """
    from ojfa_export.backends.onnxruntime import backend  # noqa: F401  what running imports
    from ojfa_export.runtime.model import load

    gc.collect()
    before = status_bytes("self", "VmRSS")
    model = load(bundle)
    spec = model.spec
    model.engines.executor(1, 1).embed([0], [Chunk(0, 0, 1)])
    # By now tokenizer, thread pool and ONNX Runtime's own code are there, but no block is.
    fixed = status_bytes("self", "VmRSS") - before
    depth = spec.blocks // 2 if exit is None else exit or spec.blocks
    session = model.session()
    session.advance([1 + at % (spec.vocab_size - 1) for at in range(prompt)], depth)
    for token in range(NEW_TOKENS):
        session.advance([token], depth)
    gc.collect()
    resident = status_bytes("self", "VmRSS") - before
    needed = bytes_needed(spec, depth, prompt + NEW_TOKENS, model.manifest.shortcut)
    weights = bytes_needed(spec, depth, 0, model.manifest.shortcut)
    return {
        "blocks": depth,
        "prompt_tokens": prompt,
        "resident_bytes": resident,
        "needed_bytes": needed,
        "ratio": resident / needed,
        "weight_bytes": weights,
        "ratio_to_weights": resident / weights,
        "peak_bytes": status_bytes("self", "VmHWM") - before,
        "fixed_bytes": fixed,
        "ratio_without_fixed": (resident - fixed) / needed,
        "limit": RUN_LIMIT,
        "verdict": "pass" if resident <= RUN_LIMIT * needed else "falls short",
    }


def bytes_needed(spec: ModelSpec, blocks: int, tokens: int, shortcut: ShortcutEntry) -> int:
    """Weights once, in fp32, of what an exit runs, and the cache of so many tokens.

    Of a tied embedding table, which is also the head, the one copy counts; of an embedding that is
    only looked up, the rows of these tokens.
    """
    rows = 4 * spec.hidden_size * tokens * (2 if spec.learned_positions else 1)
    head = head_bytes(spec) if blocks == spec.blocks else exit_head_bytes(spec, shortcut)
    cache = sum(cache_bytes(spec, block, tokens) for block in range(blocks))
    return rows + head + blocks * block_bytes(spec) + cache


def first_token(bundle: Path, repeats: int) -> dict[str, Any]:
    """Times whole processes that generate one token."""
    command = [sys.executable, "-m", "ojfa_export", "run", str(bundle)]
    command += ["-q", "-p", "def ", "--max-new-tokens", "1"]
    samples = []
    for _ in range(repeats + 1):  # the first brings the files into memory and is left out
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        samples.append(time.perf_counter() - start)
    median = statistics.median(samples[1:])
    return {
        "seconds_median": median,
        "samples_seconds": samples[1:],
        "limit": FIRST_TOKEN_LIMIT_SECONDS,
        "verdict": "pass" if median <= FIRST_TOKEN_LIMIT_SECONDS else "falls short",
    }


if __name__ == "__main__":
    main()
