"""Exits with a jump before the model's own head: `python -m bench.gpu.exits --out exits.json`.

Milliseconds of tokens that leave at an exit or go on from it, where the whole head says how sure it
is and where a check head does, behind an MLP and behind a block. Shapes of published models with
random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.run import run
from bench.gpu.shapes import SHAPES, JumpKind, RandomGraphs
from bench.gpu.steps import ALWAYS, NEVER, WARMUP, decoding
from ojfa_export.backends.block_jump import BlockJump, open_jump
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.bundle.names import CHECK_HEAD, graph_names
from ojfa_export.decoding.exits import Exit
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.runtime.session import Session

KINDS: tuple[JumpKind, ...] = ("mlp", "block")
TOKENS = 4096  # of a check head
ROUNDS = 3  # of each way, in turns


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        arguments,
        "Times exits that decide, by the whole head and by a check head.",
        BACKEND,
        measure_shape,
        batch=(1, 4),
        precisions=("fp16", "bf16"),
    )


def measure_shape(
    device: Device, name: str, directory: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Builds a shape with each jump and times its exits."""
    spec, rows = SHAPES[name], []
    length = max(options.past) + options.tokens + 2 * WARMUP + 16
    tokens = min(TOKENS, spec.vocab_size // 2)
    for kind in KINDS:
        graphs = RandomGraphs(spec, directory / kind / "graphs", length, options.precision)
        graphs.write()
        exits = graphs.jump(kind, tokens)
        plans = build(graphs, directory / kind, kind, tokens)
        for head in (spec.vocab_size, tokens):
            engines = opened(graphs, plans, exits, kind, checked=head == tokens)
            for batch in options.batch:
                rows += times(Session(spec, engines, batch, length), kind, head, exits, options)
            del engines
    return {"shape": name, "spec": spec.model_dump(mode="json"), "exits": rows}


def build(graphs: RandomGraphs, directory: Path, kind: JumpKind, tokens: int) -> dict[str, Path]:
    """Builds all engines, of both heads."""
    spec = graphs.spec
    (directory / "engines").mkdir()
    names = [*graph_names(spec.blocks, 1 if kind == "block" else 0), CHECK_HEAD]
    plans = {name: directory / "engines" / f"{name}.json" for name in names}
    for name, plan in plans.items():
        whose = spec.with_vocabulary(tokens) if name == CHECK_HEAD else spec
        BACKEND.build_engine(whose, graphs.directory / f"{name}.onnx", plan)
    return plans


def opened(
    graphs: RandomGraphs,
    plans: dict[str, Path],
    exits: tuple[int, ...],
    kind: JumpKind,
    *,
    checked: bool,
) -> TensorRtEngines:
    """Opens a model, with its check head or without."""
    files = {name: plan for name, plan in plans.items() if checked or name != CHECK_HEAD}
    spec, weights = graphs.spec, graphs.directory
    engines = BACKEND.open_engines(spec, weights, files, graphs.rotary)
    assert isinstance(engines, TensorRtEngines)
    if kind == "block":
        open_jump(BACKEND, engines, BlockJump(exits, 1, spec, weights, files, graphs.rotary))
    engines.load_blocks(spec.blocks)
    return engines


def times(
    session: Session, kind: JumpKind, head: int, exits: tuple[int, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Milliseconds at each exit, batch by batch: fixed, always sure, never sure, and full depth."""
    past, batch, rows = options.past[0], session.batch_size, []
    prompts = np.random.default_rng(1).integers(0, session.spec.vocab_size, (batch, past)).tolist()
    session.advance(prompts)
    for exit in exits:
        leaves, goes_on = (
            ExitPolicy(exits=(exit,), measure="top", thresholds=(each,)) for each in (ALWAYS, NEVER)
        )
        ways: dict[str, Exit | ExitPolicy] = {
            "fixed": exit,
            "leaves": leaves,
            "goes_on": goes_on,
            "full": "full",
        }
        samples: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, depth in ways.items():
                samples[way] += decoding(session, depth, past, options.tokens)
        medians = {way: round(float(np.median(each)), 4) for way, each in samples.items()}
        rows.append(
            {"jump": kind, "head": head, "batch": batch, "exit": exit, "past": past}
            | {f"{way}_ms": median for way, median in medians.items()}
            | {"samples_ms": {way: np.round(each, 4).tolist() for way, each in samples.items()}}
        )
        print(f"{kind}, head of {head}, batch {batch}, exit {exit}: {medians} ms", flush=True)
    return rows


if __name__ == "__main__":
    main()
