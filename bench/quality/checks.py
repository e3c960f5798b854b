"""Exits per token with a check head and without: what a check takes, and what policies then save.

python -m bench.quality.checks BUNDLE --checkpoint DIR --out bench/results/checks-smollm2.json

BUNDLE was built from DIR with the text that ships and without a check head. Heads of several sizes
are built beside it. Every exit's confidence by each of them is noted on the same tokens of text
that fitting left over; from that policies are certified as a build does, each with the costs of its
own checks. All times are of one process, the heads taking turns; full depth is timed beside each
policy, which is run as `plan` rehearses it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.commit import commit
from ojfa_export import backends
from ojfa_export.backends.backend import Engines
from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.bundle.names import CHECK_HEAD, GRAPHS
from ojfa_export.bundle.promise import Limits, Promise
from ojfa_export.cli.progress import Lines
from ojfa_export.compiler.check_stage import count_tokens, frequent
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.decoding.head_output import ExitCheck, HeadRequest
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.graphs.export import Exporter
from ojfa_export.planning.frontier import Point
from ojfa_export.planning.machine import describe_machine
from ojfa_export.planning.rehearse import ROOM, time_points
from ojfa_export.planning.step_costs import StepCosts, measure_costs
from ojfa_export.planning.turns import Turns
from ojfa_export.promises.certify import certify
from ojfa_export.promises.choose import most_eager
from ojfa_export.promises.collect import collect_statistics
from ojfa_export.promises.measures import MEASURES, confidences, round_down
from ojfa_export.promises.outcomes import Costs, apply, depths_of
from ojfa_export.promises.path import paths
from ojfa_export.promises.statistics import (
    SPLITS,
    ExitStatistics,
    load_statistics,
    save_statistics,
)
from ojfa_export.runtime.model import Model, load
from ojfa_export.system.progress import Progress

SIZES = (1024, 4096, 8192, 16_384)
LIMITS = (0.05, 0.1)
# Windows of a domain to tune and to certify on: what 5% at 95% needs, and a half more.
TUNING, CERTIFICATION = 24, 96
# Every second exit is looked at, from this part of the depth on.
FIRST_EXIT = 0.4
# Checks that are timed of each head, and rounds in which policies are.
REPEATS, ROUNDS = 150, 2
SECONDS = 5.0
WHOLE = 0


class Noting:
    """Engines whose check head notes how sure heads of every size are, and says nothing.

    The whole head has just been asked about the same rows; heads of some of its tokens have some of
    its logits.

    Args:
        engines: Without a check head.
        exits: Exits that are looked at; the others say nothing.
        tokens: Of the head of each size.
        said: Confidences [3, rows] of each size, in the order in which they are asked.
    """

    has_check_head = True

    def __init__(
        self,
        engines: Engines,
        exits: Sequence[int],
        tokens: dict[int, Int32],
        said: dict[int, list[NDArray[np.float64]]],
    ) -> None:
        self._engines, self._exits, self._tokens, self._said = engines, exits, tokens, said
        self._logits = np.zeros((0, 0), np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """See `Engines`."""
        if blocks_run in self._exits or not self._logits.size:
            self._logits = self._engines.logits(hidden, blocks_run)
        return self._logits

    def check_logits(self, hidden: Float32, blocks_run: int | Sequence[int]) -> Float32:
        """Of two tokens that are as likely."""
        if blocks_run in self._exits:
            for size, ids in self._tokens.items():
                self._said[size].append(confidences(self._logits[:, ids]))
        return np.zeros((len(hidden), 2), np.float32)


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=CERTIFICATION, help="to certify on")
    parser.add_argument(
        "--statistics",
        type=Path,
        help="directory that keeps statistics",
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    before, progress, model = commit(), Lines(sys.stderr), load(arguments.bundle)
    inputs = Inputs(
        BuildOptions(
            str(arguments.checkpoint), arguments.out.with_suffix(".ojfa"), max_disagreement=0.05
        )
    )
    counts = count_tokens(inputs, None)
    ends = model.spec.eos_token_ids
    tokens = {
        size: frequent(counts, ends, size) for size in SIZES if 2 * size <= model.spec.vocab_size
    }
    with tempfile.TemporaryDirectory(dir=arguments.bundle.absolute().parent) as folder:
        engines: dict[int, Engines] = {WHOLE: model.engines}
        for size, ids in tokens.items():
            engines[size] = with_check(model, inputs, ids, Path(folder) / str(size))
        ms = time_checks(model, engines)
        print(json.dumps(ms, indent=1), flush=True)
        kept = arguments.statistics or Path(folder)
        if not (kept / f"{WHOLE}.npz").is_file():
            collected = collect(model, inputs, tokens, arguments.windows, Path(folder), progress)
            for size in (WHOLE, *tokens):
                both = dict(zip(SPLITS, (each[size] for each in collected), strict=True))
                save_statistics(kept / f"{size}.npz", both)
        read = {size: load_statistics(kept / f"{size}.npz") for size in (WHOLE, *tokens)}
        splits = [{size: each[split] for size, each in read.items()} for split in SPLITS]
        found = policies(model, engines, splits, ms, progress)
    shares = {str(size): float(counts[ids].sum() / counts.sum()) for size, ids in tokens.items()}
    document = {
        "machine": describe_machine(),
        "commit": before,
        "model": model.manifest.model.name,
        "shortcut": model.manifest.shortcut.model_dump(mode="json"),
        "vocabulary": model.spec.vocab_size,
        "share_of_counted_text": shares,
        "check_ms": {str(size): each for size, each in ms.items()},
        "windows": [len(each[WHOLE].domain) for each in splits],
        **found,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def with_check(model: Model, inputs: Inputs, tokens: Int32, directory: Path) -> Engines:
    """The bundle's engines with a check head of some tokens, in a directory of links."""
    graphs = directory / GRAPHS
    shutil.copytree(model.bundle.graphs, graphs, copy_function=os.link)
    manifest = model.manifest
    length = manifest.cache.max_length
    exporter = Exporter(inputs.checkpoint, graphs, manifest.precision, length)
    exporter.check_head(tokens)
    backend, spec = backends.load("onnxruntime"), model.spec
    engine = directory / f"{CHECK_HEAD}.onnx"
    backend.build_engine(spec.with_vocabulary(len(tokens)), graphs / engine.name, engine)
    files = {**model.bundle.engine_files("onnxruntime"), CHECK_HEAD: engine}
    assert isinstance(model.engines, OnnxRuntimeEngines)
    return backend.open_engines(spec, graphs, files, model.engines.rotary)


def time_checks(model: Model, engines: dict[int, Engines]) -> dict[int, dict[str, float]]:
    """Milliseconds of asking one row how sure an exit is, by head and measure; heads in turns."""
    exit = model.blocks // 2
    rows = np.random.default_rng(0).normal(size=(REPEATS, 1, model.spec.hidden_size))
    times: dict[int, dict[str, list[float]]] = {
        size: {each: [] for each in (*MEASURES, "product")} for size in engines
    }
    for hidden in rows.astype(np.float32):
        for measure in MEASURES:
            request = HeadRequest(check=ExitCheck(measure, 2.0, range(exit, exit + 1)))
            for size, each in engines.items():  # none finds its weights in the caches
                start = time.perf_counter()
                output = each.choose(hidden, exit, request)
                middle = time.perf_counter()
                output.confidence(measure)
                times[size][measure].append(time.perf_counter() - start)
                times[size]["product"].append(middle - start)
    return {
        size: {name: 1e3 * float(np.median(found)) for name, found in each.items()}
        for size, each in times.items()
    }


def collect(
    model: Model,
    inputs: Inputs,
    tokens: dict[int, Int32],
    windows: int,
    scratch: Path,
    progress: Progress,
) -> list[dict[int, ExitStatistics]]:
    """Tuning and certification statistics by head, of the same tokens."""
    given, blocks = inputs.statistics_windows, model.blocks
    assert given is not None
    exits = range(int(FIRST_EXIT * blocks), blocks, 2)
    parts = [
        np.concatenate([_spread(tuning, TUNING), _spread(certification, windows)])
        for tuning, certification in zip(given.tuning, given.certification, strict=True)
    ]
    all_ids = np.arange(model.spec.vocab_size, dtype=np.int32)
    every_head = {WHOLE: all_ids, **tokens}
    said: dict[int, list[NDArray[np.float64]]] = {size: [] for size in every_head}
    whole = collect_statistics(
        model.spec,
        lambda: Noting(model.engines, (*exits, blocks), every_head, said),
        given.domains,
        parts,
        scratch,
        progress,
        np.random.default_rng(0),
    )
    columns = [whole.exits.index(exit) for exit in exits]
    some = replace(
        whole,
        exits=tuple(exits),
        confidence=whole.confidence[..., columns],
        agrees=whole.agrees[..., columns],
        extra_surprisal=whole.extra_surprisal[..., columns],
    )
    _, count, sampled, _ = some.confidence.shape
    tuned = np.concatenate([np.arange(len(each)) < TUNING for each in parts])
    every = {}
    for size, each in said.items():
        # By exit, then window: [exits, windows, 3, sampled].
        table = np.stack(each).reshape(len(exits), count, len(MEASURES), sampled)
        every[size] = replace(some, confidence=round_down(table.transpose(2, 1, 3, 0)))
    return [
        {size: each.select(np.flatnonzero(rows)) for size, each in every.items()}
        for rows in (tuned, ~tuned)
    ]


def _spread(windows: Int32, count: int) -> Int32:
    some: Int32 = windows[np.unique(np.linspace(0, len(windows) - 1, count).astype(int))]
    return some


def policies(
    model: Model,
    engines: dict[int, Engines],
    splits: list[dict[int, ExitStatistics]],
    ms: dict[int, dict[str, float]],
    progress: Progress,
) -> dict[str, Any]:
    """Each head's certified policies: what they are expected to save, and what they do."""
    length = model.manifest.cache.max_length
    costs = measure_costs(
        model.spec, model.engines, length, rounds=6, seconds=2 * SECONDS, progress=progress
    )
    tuning, certification = splits
    rows: list[dict[str, Any]] = []
    timed: dict[int, tuple[int, ExitPolicy, StepCosts]] = {}
    for limit in LIMITS:
        for size in engines:
            own = costs_of(costs, ms, size)
            limits = Limits(max_disagreement=limit, confidence=0.95)
            promise = certify(tuning[size], certification[size], limits, own.of_policies())
            rows.append({"limit": limit, "size": size, "certified": described(promise)})
            policy = promise.policy or cheapest(tuning[size], limits, own.of_policies())
            if policy is not None:
                rows[-1]["tried"] = tried(policy, certification[size], own.of_policies())
                timed[len(rows) - 1] = (size, policy, own)
    for _ in range(ROUNDS):  # heads in turns: what else runs on the machine meets them alike
        for index, (size, policy, own) in timed.items():
            share = rehearsed(model, engines[size], certification[size], policy, own, progress)
            rows[index].setdefault("measured", []).append(share)
    return {"costs": costs.model_dump(mode="json"), "policies": rows}


def costs_of(costs: StepCosts, ms: dict[int, dict[str, float]], size: int) -> StepCosts:
    """The costs of steps, those of checks as a head of this size has them."""
    if size == WHOLE:
        return costs
    # Ratios, as what else ran on the machine was not the same at both times.
    checks = {
        measure: each * ms[size][measure] / ms[WHOLE][measure]
        for measure, each in costs.checks.items()
    }
    return costs.model_copy(update={"checks": checks, "leaving": costs.exit_head})


def described(promise: Promise) -> dict[str, Any]:
    """What is promised, and of what evidence."""
    policy = promise.policy
    return {
        "exits": None if policy is None else list(policy.exits),
        "measure": None if policy is None else policy.measure,
        "thresholds": None if policy is None else list(policy.thresholds),
        "expected": promise.relative_cost,
        "depth": {each.name: each.depth for each in promise.domains},
        "disagreement": {each.name: each.disagreement for each in promise.domains},
    }


def cheapest(tuning: ExitStatistics, limits: Limits, costs: Costs) -> ExitPolicy | None:
    """The one exit that costs least within the limit on the tuning text, worthwhile or not."""
    best, found = float("inf"), None
    for everything in paths(tuning):
        for exit in tuning.exits:
            path = everything.only((exit,))
            step = most_eager(path, tuning, limits, list(limits.shares()), costs)
            policy = None if step is None else path.policy(step)
            if policy is not None:
                cost = float(apply(tuning, policy, costs, surprisal_clip=1.0).cost.mean())
                best, found = min((best, found), (cost, policy), key=lambda each: each[0])
    return found


def tried(policy: ExitPolicy, certification: ExitStatistics, costs: Costs) -> dict[str, Any]:
    """What a policy does to the certification text, and what it would cost there."""
    seen = apply(certification, policy, costs, surprisal_clip=1.0)
    free = apply(certification, policy, replace(costs, catch_up=0, waiting=0), surprisal_clip=1.0)
    return {
        "policy": policy.model_dump(mode="json"),
        "leave": float((depths_of(certification, policy) < certification.blocks).mean()),
        "differ": float(seen.disagreement.mean()),
        "expected": float(seen.cost.mean()) / costs.full,
        "expected_without_catching_up": float(free.cost.mean()) / costs.full,
    }


def rehearsed(
    model: Model,
    engines: Engines,
    statistics: ExitStatistics,
    policy: ExitPolicy,
    costs: StepCosts,
    progress: Progress,
) -> float:
    """A token's time under a policy, full depth's being 1, timed in turns."""
    full = Point("full", costs.full, 1, 1, model.blocks)
    expected = apply(statistics, policy, costs.of_policies(), surprisal_clip=1.0).cost.mean()
    point = replace(full, kind="auto", policy=policy, ms=float(expected))
    turns = Turns(model.spec, engines, model.manifest.cache.max_length, ROOM)
    found = time_points([full, point], statistics, costs, turns, SECONDS, progress)
    return found[point].ms / found[full].ms


if __name__ == "__main__":
    main()
