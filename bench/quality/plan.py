"""What the planner predicts against what the same ways then take on text that it hasn't seen.

python -m bench.quality.plan --case demo demo.ojfa code-read.txt,docs-read.txt --out plan.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from ojfa_export.bundle.names import STATISTICS
from ojfa_export.bundle.promise import Limits
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.planning.frontier import Point, fixed_exits, policy_point, speculation
from ojfa_export.planning.machine import describe_machine
from ojfa_export.planning.plan import make_plan
from ojfa_export.planning.reading import Way, cut_pieces, read_pieces
from ojfa_export.planning.rehearse import ROOM, time_points
from ojfa_export.planning.step_costs import StepCosts, measure_costs
from ojfa_export.planning.turns import Clock, Turns
from ojfa_export.promises.choose import most_eager
from ojfa_export.promises.path import paths
from ojfa_export.promises.statistics import ExitStatistics, load_statistics, split_with
from ojfa_export.runtime.model import Model, load
from ojfa_export.system.progress import SILENT

PROMPT_TOKENS = 128
# Of timing in each round, and of each piece of text: little of either before it is the other's
# turn, so that what else the machine does hits both.
ROUNDS, REPEATS = 8, 2
# Shares of tokens that may differ, for the policies that are tried whether or not they pay.
DISAGREEMENTS = (0.05, 0.15, 0.4)
DRAFTS = (1, 4)
# On a machine that others use too, the wall's clock shows when they ran. With OJFA_THREADS=1 all
# work is the calling thread's, and its own clock counts that alone.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "thread": time.thread_time}


def main() -> None:
    """Runs every case and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("NAME", "BUNDLE", "TEXT[,TEXT]")
    parser.add_argument("--case", nargs=3, action="append", required=True, metavar=names)
    parser.add_argument("--rounds", type=int, default=2, help="of predicting, then measuring")
    parser.add_argument("--tokens", type=int, default=576, help="read each way in a round")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="see CLOCKS")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cases = {}
    for name, bundle, texts in arguments.case:
        files = [Path(text) for text in texts.split(",")]
        cases[name] = compare(
            Path(bundle), files, arguments.rounds, arguments.tokens, CLOCKS[arguments.clock]
        )
        print(name, json.dumps(cases[name]["ways"], indent=1), flush=True)
    document = {
        "machine": describe_machine(),
        "clock": arguments.clock,
        "commit": commit(),
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def compare(
    bundle: Path, texts: list[Path], rounds: int, tokens: int, clock: Clock
) -> dict[str, Any]:
    """Predicts and measures in turn; medians over the rounds count."""
    model, splits = load(bundle), load_statistics(bundle / STATISTICS)
    ways = ways_to_try(model, splits)
    pieces = cut_pieces(model, texts, PROMPT_TOKENS, tokens)
    length = model.manifest.cache.max_length
    costs, predicted, measured = [], [], []
    for _ in range(rounds):
        costs.append(
            measure_costs(
                model.spec,
                model.engines,
                length,
                rounds=10,
                seconds=60,
                progress=SILENT,
                clock=clock,
            )
        )
        points = {n: expect(way, splits, costs[-1]) for n, way in ways.items()}
        turns = Turns(model.spec, model.engines, length, ROOM, clock=clock)
        rehearsed = time_points(
            [p for p in points.values() if p.kind in ("auto", "speculation")],
            splits["tuning"], costs[-1], turns, 60, SILENT,
        )  # fmt: skip
        predicted.append({n: rehearsed.get(p, p) for n, p in points.items()})
        measured.append(read_pieces(model, pieces, ways, PROMPT_TOKENS, SILENT, REPEATS, clock))
    plan = make_plan(splits, middle(costs), model.manifest.auto, 0.95)
    rows: dict[str, dict[str, Any]] = {}
    for name in ways:
        expected = float(np.median([each[name].ms for each in predicted]))
        found = float(np.median([each[name].ms_per_token for each in measured]))
        rows[name] = {
            "predicted_ms": expected,
            "measured_ms": found,
            "error": expected / found - 1,
            "predicted_agreement": predicted[0][name].agreement,
            "measured_agreement": measured[0][name].agreement,
            "predicted_blocks": predicted[0][name].blocks,
            "measured_blocks": measured[0][name].blocks,
            "tokens_per_pass": measured[0][name].tokens_per_pass,
            "rounds_predicted_ms": [each[name].ms for each in predicted],
            "rounds_measured_ms": [each[name].ms_per_token for each in measured],
        }
    errors = [abs(row["error"]) for row in rows.values()]
    return {
        "blocks": model.blocks,
        "text_tokens": len(pieces) * (pieces.shape[1] - PROMPT_TOKENS - 1),
        "largest_error": max(errors),
        "within_10_percent": sum(error <= 0.1 for error in errors),
        "ways": rows,
        "costs_ms": [each.model_dump() for each in costs],
        "advice": plan.advice,
        "default": plan.default.model_dump(mode="json"),
    }


def ways_to_try(model: Model, splits: Mapping[str, ExitStatistics]) -> dict[str, Way]:
    """Fixed exits, policies that let go ever more tokens, and drafts of several lengths."""
    blocks = model.blocks
    middle_exits = tuple(sorted({max(1, blocks * share // 4) for share in (2, 3)} | {blocks - 1}))
    ways: dict[str, Way] = {f"exit {exit}": exit for exit in middle_exits}
    ways["full"] = blocks
    tuning = splits["tuning"]
    path = paths(tuning)[0].only(middle_exits)
    free = StepCosts(
        exits=(1.0,) * blocks, exit_head=0, final_head=0, final_row=0, decide=0,
        checks={"top": 0, "margin": 0, "entropy": 0}, catch_up=0, waiting=0,
    ).of_policies()  # fmt: skip
    for share in DISAGREEMENTS:
        limits = Limits(max_disagreement=share)
        step = most_eager(path, tuning, limits, limits.shares(), free)
        policy = None if step is None else path.policy(step)
        if policy is not None:
            ways[f"auto, {share:g} may differ"] = policy
    for exit in (blocks // 2, blocks - 1):
        for draft in DRAFTS:
            ways[f"speculation, {draft} from exit {exit}"] = Speculation(exit, draft)
    return ways


def expect(way: Way, splits: Mapping[str, ExitStatistics], costs: StepCosts) -> Point:
    """The planner's point of a way, before it is rehearsed."""
    if isinstance(way, ExitPolicy):
        return policy_point(way, split_with(splits, way.exits), costs)
    statistics = split_with(splits, splits["tuning"].exits)
    if isinstance(way, Speculation):
        wanted = way.exit, way.draft
        return next(p for p in speculation(statistics, costs) if (p.exit, p.draft) == wanted)
    return fixed_exits(statistics, costs)[way - 1]


def middle(costs: list[StepCosts]) -> StepCosts:
    """The round whose full step is the median."""
    return sorted(costs, key=lambda each: each.full)[len(costs) // 2]


if __name__ == "__main__":
    main()
