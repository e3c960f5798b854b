"""Weights of four bits beside onnxruntime-genai's: `python -m bench.cpu.weights BUNDLE CHECKPOINT`.

The bundle is the checkpoint's with int4 weights (`build --weights int4`); genai's model is what its
own builder makes of the checkpoint, in groups of 32 with 8-bit products as well. Batch 1, full
depth. They take turns: bursts of single tokens past a prompt of 128, and such prompts. Each is a
process of its own, stopped while the other runs: threads that wait for work keep a core busy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from bench.cpu.contestants import Chain, Contestant, Genai
from bench.memory.usage import status_bytes

KINDS = ("ojfa-export", "onnxruntime-genai")
PAST, BURST, WARMUP, CAPACITY = 128, 32, 4, 256
TOKENS = range(5, 4000)  # of which prompts are made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options)
        return
    workers = {kind: Worker(kind, options) for kind in KINDS}
    samples: dict[str, dict[str, list[float]]] = {
        what: {kind: [] for kind in KINDS} for what in ("ms_per_token", "prompt_ms", "memory_mb")
    }
    try:
        for turn in range(options.rounds):
            for kind in KINDS[:: 1 if turn % 2 else -1]:
                for what, value in workers[kind].turn().items():
                    samples[what][kind].append(value)
    finally:
        for each in workers.values():
            each.end()
    result: dict[str, Any] = {"commit": commit(), "cores": os.cpu_count(), "past": PAST}
    ours, theirs = KINDS
    for what, found in samples.items():
        medians = {kind: float(np.median(each)) for kind, each in found.items()}
        result |= {what: medians, f"{what}_of_genai": medians[ours] / medians[theirs]}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result | {"samples": samples}) + "\n", encoding="utf-8")


class Worker:
    """A contestant's process, which runs in its turns alone.

    Args:
        kind: Which.
        options: Of the command.
    """

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "bench.cpu.weights", options.bundle, options.checkpoint]
        self._process = subprocess.Popen(
            [*map(str, command), "--work", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        self._process.send_signal(signal.SIGSTOP)

    def turn(self) -> dict[str, float]:
        """A prompt and a burst."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        print("turn", file=self._process.stdin, flush=True)
        answer: dict[str, float] = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        """Ends the process."""
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # builders print too
                return json.loads(line)
        raise SystemExit("a contestant ended; its error is above")


def work(options: argparse.Namespace) -> None:
    """Takes turns until the input ends."""
    prompt = np.random.default_rng(0).choice(TOKENS, PAST).tolist()
    with tempfile.TemporaryDirectory() as folder:
        contestant = opened(options, Path(folder))
        contestant.start(prompt)
        print("{}", flush=True)
        for turn, _ in enumerate(sys.stdin):
            other = [*prompt[1:], TOKENS[turn]]  # no prompt is the one before
            prompt_ms = _ms(partial(contestant.start, other))
            contestant.rewind()
            steps = [_ms(contestant.step) for _ in range(WARMUP + BURST)][WARMUP:]
            contestant.rewind()
            found = {"ms_per_token": float(np.median(steps)), "prompt_ms": prompt_ms}
            held = status_bytes("self", "VmRSS") / 1e6
            print(json.dumps(found | {"memory_mb": held}), flush=True)


def opened(options: argparse.Namespace, folder: Path) -> Contestant:
    """The contestant of this process."""
    if options.work == KINDS[1]:
        return Genai(options.checkpoint, folder, 0, CAPACITY, "int4")
    import ojfa_export

    model = ojfa_export.load(options.bundle)
    return Chain(model.session(max_length=CAPACITY), model.blocks)


def _ms(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
