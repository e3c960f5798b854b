"""Whether a small head should be asked before the whole one: which tokens pass it, what that costs.

python -m bench.quality.gate --case demo demo.ojfa --case smollm2 smollm2.ojfa --text FILE \
    --out bench/results/gate.json

The small head is the rows of the N tokens that are most frequent in the text that ships. Its top
probability is never below the whole head's, as it leaves out other tokens' share: a gate at the
exit's own threshold can lose only tokens whose word it doesn't know. The other gate is the highest
that loses a tenth of those that would leave, on the first half of the windows; all figures are of
the second half. Thresholds are where the bundle's tuning text agrees with a probability of 1 - e.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.commit import commit
from bench.quality.self_text import windows_of
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.names import STATISTICS
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.decoding.confidence import confidence
from ojfa_export.models.calibration_text import read_source, shipped_text
from ojfa_export.models.tokenizer import encode_all
from ojfa_export.planning.machine import describe_machine
from ojfa_export.promises.path import isotonic
from ojfa_export.promises.statistics import ExitStatistics, load_statistics
from ojfa_export.runtime.model import Model, load

Float64 = NDArray[np.float64]
SIZES = (1024, 4096, 8192, 16_384)
EAGERNESS = (0.05, 0.1, 0.2, 0.4)
# Of the depth: the exits that are looked at.
PARTS = (0.25, 0.5, 0.75, 0.9)
LOST = 0.1
# Tokens of each window that are looked at, and products that are timed.
TOKENS, REPEATS = 64, 60


def main() -> None:
    """Measures every case and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", nargs=2, action="append", required=True, metavar=("NAME", "BUNDLE")
    )
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--windows", type=int, default=32, help="of each text")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    before, cases = commit(), {}
    for name, bundle in arguments.case:
        model = load(bundle)
        windows = np.concatenate(
            [windows_of(model, path, arguments.windows) for path in arguments.text]
        )
        cases[name] = measure(model, windows)
        document = {"machine": describe_machine(), "commit": before, "cases": cases}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(model: Model, windows: Int32) -> dict[str, Any]:
    """All gates of a bundle, and what heads of these sizes take."""
    sizes = [size for size in SIZES if size < model.spec.vocab_size]
    order = frequent(model)
    tuning = load_statistics(model.bundle.path(STATISTICS))["tuning"]
    seconds = {size: head_seconds(size, model.spec.hidden_size) for size in sizes}
    whole = head_seconds(model.spec.vocab_size, model.spec.hidden_size)
    exits = sorted({max(1, round(part * model.blocks)) for part in PARTS} - {model.blocks})
    rows = []
    for exit, found in asked(model, windows, exits, order, sizes).items():
        for eagerness in EAGERNESS:
            threshold = threshold_of(tuning, exit, eagerness)
            for size in sizes:
                small = seconds[size] / whole
                row = {"exit": exit, "eagerness": eagerness, "size": size}
                rows.append({**row, **gates(found, threshold, size, small)})
    return {
        "vocabulary": model.spec.vocab_size,
        "hidden_size": model.spec.hidden_size,
        "head_ms": {"whole": 1e3 * whole, **{str(n): 1e3 * s for n, s in seconds.items()}},
        "tokens": len(windows) // 2 * TOKENS,
        "gates": rows,
    }


def frequent(model: Model) -> Int32:
    """All token ids, the most frequent of the text that ships first."""
    counts = np.zeros(model.spec.vocab_size, np.int64)
    for path in shipped_text():
        for ids in encode_all(model.tokenizer, read_source(path).documents):
            counts += np.bincount(ids, minlength=counts.size)
    return np.argsort(-counts, kind="stable").astype(np.int32)


def asked(
    model: Model, windows: Int32, exits: list[int], order: Int32, sizes: list[int]
) -> dict[int, dict[int, Float64]]:
    """Of each exit the top probability [windows, TOKENS] of heads of each size; 0 is the whole."""
    shape = (len(windows), TOKENS)
    found = {exit: {size: np.zeros(shape) for size in (0, *sizes)} for exit in exits}
    rng = np.random.default_rng(0)
    for index, window in enumerate(windows):
        executor = model.engines.executor(1, len(window))
        chunks = [Chunk(0, 0, len(window))]
        hidden = np.asarray(executor.embed(window.tolist(), chunks))
        places = np.sort(rng.choice(len(window), TOKENS, replace=False))
        for exit in range(1, exits[-1] + 1):
            block = range(exit - 1, exit)
            hidden = np.asarray(executor.run(block, hidden, chunks, long_context=False))
            if exit in found:
                logits = model.engines.logits(np.ascontiguousarray(hidden[places]), exit)
                for size, top in top_probabilities(logits, order, sizes).items():
                    found[exit][size][index] = top
    return found


def top_probabilities(logits: Float32, order: Int32, sizes: list[int]) -> dict[int, Float64]:
    """The top probability [n] of logits [n, V] over all tokens (0) and over the first of order."""
    ordered = logits[:, order].astype(np.float64)
    top = ordered.max(axis=1)
    tops = {0: 1 / np.exp(ordered - top[:, None]).sum(axis=1)}
    for size in sizes:
        some = ordered[:, :size]
        tops[size] = 1 / np.exp(some - some.max(axis=1)[:, None]).sum(axis=1)
    return tops


def threshold_of(tuning: ExitStatistics, exit: int, eagerness: float) -> float:
    """The least confidence at which the exit agrees with probability 1 - eagerness."""
    column = tuning.exits.index(exit)
    sure = tuning.of("top")[..., column].astype(np.float64).ravel()
    steps, agreement = isotonic(sure, tuning.agrees[..., column].ravel())
    first = int(np.searchsorted(agreement, 1 - eagerness))
    return float(steps[first]) if first < len(steps) else float("inf")


def gates(found: dict[int, Float64], threshold: float, size: int, small: float) -> dict[str, Any]:
    """What two gates before one exit do, on the second half of the windows.

    Args:
        found: Top probabilities by size of head; 0 is the whole one.
        threshold: Of the exit.
        size: Of the small head.
        small: What it costs, the whole one being 1.
    """
    half = len(found[0]) // 2
    leaves, passing = found[0] >= threshold, found[size]
    would = passing[:half][leaves[:half]]
    tuned = float(np.quantile(would, LOST)) if would.size else threshold
    share = float(leaves[half:].mean())
    row: dict[str, Any] = {"threshold": threshold, "leave": share}
    for name, gate in (("same", threshold), ("tuned", tuned)):
        passes = passing[half:] >= gate
        lost = float((leaves[half:] & ~passes).mean())
        row[name] = {
            "gate": gate,
            "pass": float(passes.mean()),
            "lost": lost / share if share else None,
            # One that leaves needs the whole head's token, as it would without an exit.
            "check": small + float(passes.mean()),
            "check_in_vain": small + float((passes & ~leaves[half:]).mean()),
        }
    return row


def head_seconds(rows: int, hidden: int) -> float:
    """Median seconds of a head's product on one token, and of its confidence."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(rows, hidden)).astype(np.float32)
    vector = rng.normal(size=(1, hidden)).astype(np.float32)
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        confidence(vector @ matrix.T, "top")
        times.append(time.thread_time() - start)
    return float(np.median(times))


if __name__ == "__main__":
    main()
