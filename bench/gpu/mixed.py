"""Passes of steps and prompts together: `python -m bench.gpu.mixed --out mixed.json`.

What the engine's scheduler chooses from: so many sequences decode past 512 beside pieces of
prompts, at Llama-2-7B's shape with random weights in fp16, on the TensorRT backend.
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
from bench.gpu.slots import filled
from bench.gpu.tensorrt import build
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence

PAST, LENGTH, SEQUENCES, PROMPTS = 512, 1408, 64, 16
LONGEST_PIECE = 512
TOTALS = (64, 96, 128, 192, 256, 384, 512, 1024, 2048)
WARMUP, REPEATS = 3, 5


def main(arguments: Many[str] | None = None) -> None:
    """Times every pass and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decoding", type=int, nargs="+", default=[0, 1, 4, 8, 16, 32, 48, 63])
    options = parser.parse_args(arguments)
    spec = SHAPES["llama2-7b"]
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": {**BACKEND.versions(), "nvidia_smi": nvidia_smi()},
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="ojfa-gpu-") as folder:
        directory = Path(folder)
        graphs = RandomGraphs(spec, directory / "graphs", LENGTH)
        graphs.write()
        plans, _ = build(spec, directory)
        engines = BACKEND.open_engines(spec, directory / "graphs", plans, graphs.rotary)
        engines.load_blocks(spec.blocks)
        passes = Passes(ModelRunner(spec, engines, SEQUENCES + PROMPTS, LENGTH))
        for count in options.decoding:
            for pieces in [[], *(pieces_of(total - count) for total in TOTALS if total > count)]:
                if count or pieces:
                    result["rows"].append(passes.time(count, pieces))
                    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


def pieces_of(tokens: int) -> list[int]:
    """Pieces of several prompts, none longer than LONGEST_PIECE."""
    rest = tokens % LONGEST_PIECE
    return [LONGEST_PIECE] * (tokens // LONGEST_PIECE) + [rest] * (rest > 0)


class Passes:
    """Passes over sequences that decode, and prompts that begin.

    Args:
        runner: Of the model.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._decoding = filled(runner, range(SEQUENCES), PAST)
        slots = range(SEQUENCES, SEQUENCES + PROMPTS)
        self._prompts = [Sequence(slot, runner.spec.blocks) for slot in slots]

    def time(self, decoding: int, pieces: list[int]) -> dict[str, Any]:
        """Milliseconds of a pass: to its tokens one by one, and of one among others."""
        for _ in range(WARMUP):
            self._launch(decoding, pieces).tokens()
        alone = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            self._launch(decoding, pieces).tokens()
            alone.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        outputs = [self._launch(decoding, pieces) for _ in range(REPEATS)]
        outputs[-1].tokens()
        together = (time.perf_counter() - start) / REPEATS * 1e3
        median = float(np.median(alone))
        print(decoding, pieces, round(median, 2), round(together, 2), flush=True)
        return {
            "decoding": decoding,
            "pieces": pieces,
            "ms_median": median,
            "samples_ms": alone,
            "ms_in_a_row": together,
        }

    def _launch(self, decoding: int, pieces: list[int]) -> HeadOutput:
        for sequence in self._decoding[:decoding]:
            sequence.truncate(PAST)
            sequence.append([5])
        for sequence, length in zip(self._prompts, pieces, strict=False):
            sequence.truncate(0)
            sequence.append([7] * length)
        some = self._decoding[:decoding] + self._prompts[: len(pieces)]
        runner, blocks = self._runner, self._runner.spec.blocks
        hidden = runner.run(some, blocks, [1] * len(some))
        return runner.engines.choose(hidden, blocks, HeadRequest())


if __name__ == "__main__":
    main()
