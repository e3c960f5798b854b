"""Exits' checks and sampling, alone and around blocks: `python -m bench.gpu.choosing`.

Needs no TensorRT: kernels and random weights. Prints microseconds: of the check alone, in both of
its sizes; of a block without a check, with one before it, and with one beside it, as one CUDA graph
and as one for each block, as sessions launch them; and of drawing a token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.attention import ALL_SHAPES, Bench, run_all
from bench.gpu.clock import copy_bandwidth, event_time, graph_time
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.choosing import Chooser
from ojfa_export.backends.cuda.device import Device, the_device
from ojfa_export.backends.cuda.kernels import integer, number, pointer
from ojfa_export.backends.cuda.mailbox import SLOTS, HeadArguments, Mailbox
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.tensorrt.heads import (
    BESIDE_THREADS,
    CHECK_RANK,
    CHECK_THREADS,
    NOTHING_TO_KEEP,
)
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.models.spec import ModelSpec

SAMPLINGS = {
    "temperature": Sampling(0.8),
    "top-k 50": Sampling(0.8, top_k=50),
    "top-p 0.9": Sampling(0.8, top_p=0.9),
    "top-k 50, top-p 0.9": Sampling(0.8, top_k=50, top_p=0.9),
}
REPEATS = 20
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times the choosing kernels on this GPU.")
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, default=["llama2-7b"])
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rank", type=int, help="of the shortcut; default: features / 100")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    device = the_device()
    copied = copy_bandwidth(device)
    print(f"{device.name}: copies {copied / 1e12:.2f} TB/s", flush=True)
    rows: list[Row] = []
    for name in options.shapes:
        bench = Bench(device, ALL_SHAPES[name], options.blocks)
        rank = options.rank or ALL_SHAPES[name].hidden_size // 100
        check = Check(device, bench, ALL_SHAPES[name], rank + 1)  # folded
        weights = [bench.weights() for _ in range(options.blocks)]
        found = [
            *check.alone(),
            *around_blocks(device, bench.block_works(options.past, weights), check),
            *check.draws(),
        ]
        for row in found:
            row["shape"] = name
            print("{shape}, {what}: {us:.2f} us".format(**row), flush=True)
        rows += found
    if options.out:
        described = {"gpu": device.name, "copy_bytes_per_second": copied, "rows": rows}
        options.out.write_text(json.dumps(described, indent=1) + "\n")


class Check:
    """The folded exit head of a shape, with random weights.

    Args:
        device: The GPU.
        bench: Whose kernels.
        spec: The shape.
        rank: Of the folded head.
    """

    def __init__(self, device: Device, bench: Bench, spec: ModelSpec, rank: int) -> None:
        self._device, self._kernels, self._spec, self._rank = device, bench.kernels, spec, rank
        self._mailbox = Mailbox(device)
        self._chooser = Chooser(bench.kernels, self._mailbox, spec.vocab_size)
        rng = np.random.default_rng(3)
        arrays = bench.arrays
        self._columns = -(-rank // 8) * 8
        self._hidden = arrays.asarray(rng.standard_normal((1, spec.hidden_size), np.float32))
        self._project = arrays.asarray(
            rng.standard_normal((rank, spec.hidden_size), np.float32) / 64
        )
        self._bias = arrays.asarray(np.zeros(rank, np.float32))
        vocabulary = rng.standard_normal((spec.vocab_size, self._columns), np.float32)
        self._vocabulary = arrays.upload(vocabulary.astype(np.float16))
        self._parts = arrays.lasting((device.multiprocessors, 2, CHECK_RANK), np.uint64)
        device.clear(self._parts.pointer, self._parts.nbytes)
        self._logits = arrays.asarray(3 * rng.standard_normal((1, spec.vocab_size), np.float32))
        # The worst case for a kernel that sorts logits into bins.
        self._equal = arrays.asarray(np.zeros((1, spec.vocab_size), np.float32))

    def launch(self, *, beside: bool) -> None:
        """Puts a check on the stream that never stops."""
        asked = HeadArguments(measure=0, threshold=2.0, sampled=False)
        self._kernels.launch(
            "exit_check_beside_1" if beside else "exit_check_1",
            (self._device.multiprocessors, 1, 1),
            (BESIDE_THREADS if beside else CHECK_THREADS, 1, 1),
            (
                *map(pointer, (None, self._hidden.pointer, self._project.pointer)),
                *map(pointer, (self._bias.pointer, self._vocabulary.pointer, None)),
                pointer(self._parts.pointer),
                integer(self._spec.hidden_size),
                integer(self._rank),
                integer(self._columns),
                integer(self._spec.vocab_size),
                number(1e-5),
                *NOTHING_TO_KEEP,
                *self._mailbox.asked(asked),
            ),
            overlapping=True,
        )

    def alone(self) -> list[Row]:
        """One check after the other."""
        return [
            {
                "what": f"a check of {'few' if beside else 'many'} threads",
                "us": self._repeated(partial(self.launch, beside=beside)),
            }
            for beside in (False, True)
        ]

    def draws(self) -> list[Row]:
        """Drawing a token from logits that are there."""
        return [
            {"what": f"drawing, {name}{kind}", "us": self._draw(logits, sampling)}
            for kind, logits in {"": self._logits, ", equal logits": self._equal}.items()
            for name, sampling in SAMPLINGS.items()
        ]

    def _draw(self, logits: DeviceArray, sampling: Sampling) -> float:
        request = HeadRequest(sampling, [0.5])
        greedy, asked = (HeadArguments.of(each) for each in (HeadRequest(), request))
        for _ in range(SLOTS):  # each answer that is given in turn finds how to draw
            self._mailbox.leave(request)
            self._mailbox.expect(1)
        self._chooser.choose(logits, greedy)  # finds the largest
        return self._repeated(partial(self._chooser.sample, logits, asked))

    def _repeated(self, work: Work) -> float:
        return graph_time(self._device, partial(run_all, [work] * REPEATS)) / REPEATS


def around_blocks(device: Device, blocks: list[Work], check: Check) -> list[Row]:
    """Blocks without checks, with a check before each, and with one beside each."""
    before = [partial(run_all, [partial(check.launch, beside=False), each]) for each in blocks]
    beside = [partial(device.beside, partial(check.launch, beside=True), each) for each in blocks]
    rows = []
    ways: dict[str, list[Work]] = {"no check": blocks, "before": [*before], "beside": [*beside]}
    for name, works in ways.items():
        whole = graph_time(device, partial(run_all, works)) / len(works)
        graphs = [device.capture(work) for work in works]
        launches = partial(run_all, [graph.launch for graph in graphs])
        launches()
        each = event_time(device, launches) / len(works)
        rows.append({"what": f"a block, {name}", "us": whole})
        rows.append({"what": f"a block, {name}, each launched by itself", "us": each})
    return rows


if __name__ == "__main__":
    main()
