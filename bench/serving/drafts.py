"""Greedy answers of a bundle with a draft layer, with drafts and without, on any backend.

    python -m bench.serving.drafts BUNDLE --chat --prompts bench/serving/questions.txt --out FILE

For each line of a file: whether tokens are equal, what a token takes, and how many a check gives.
"full" is full depth, "default" what the bundle does where nothing is asked, "adapted" drafts as
many as pay by `--costs`, and numbers are fixed. With `--chat` a line is a user's message, with
`--batch 8` eight run at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from ojfa_export import backends
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.planning.machine import describe_machine
from ojfa_export.runtime.model import Model, load

# Batches of a way before the next way's turn: what a session records serves those after it.
IN_A_ROW = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes one JSON file."""
    options = _parser().parse_args(arguments)
    machine = describe_machine(backend=backends.load(options.backend))
    result = {"commit": commit(), "machine": machine, **of_bundle(options)}
    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--prompts", type=Path, required=True, help="a prompt in each line")
    parser.add_argument("--chat", action="store_true", help="a line is a user's message")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--most", type=int, help="prompts at most")
    parser.add_argument("--new", type=int, default=200, help="tokens of each prompt")
    names = ("DRAFT", "CHECK", "ROUND")
    parser.add_argument("--costs", type=float, nargs=3, metavar=names, help="as of Speculation")
    parser.add_argument("--drafts", type=int, nargs="*", default=[], help="fixed numbers as well")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser


def of_bundle(options: argparse.Namespace) -> dict[str, Any]:
    """Generates from a bundle, each batch of prompts with drafts and without, in turns."""
    model, at_once = load(options.bundle, backend=options.backend), options.batch
    prompts = read_prompts(model, options)
    asked: dict[str, dict[str, Any]] = {"full": {"exit": "full"}, "default": {}}
    if options.costs is not None:
        draft, check, once = options.costs
        costs = {"draft_cost": draft, "check_cost": check, "round_cost": once}
        asked["adapted"] = {"speculate": Speculation(0, **costs)}
    asked |= {str(count): {"speculate": Speculation(0, count)} for count in options.drafts}
    ways: dict[str, Callable[[list[str]], dict[str, Any]]] = {
        name: partial(generated, model, options.new, how) for name, how in asked.items()
    }
    batches = [prompts[at : at + at_once] for at in range(0, len(prompts), at_once)]
    for run in ways.values():
        run(batches[0])  # recordings are made
    rows: list[dict[str, dict[str, Any]]] = []
    for at in range(0, len(batches), IN_A_ROW):
        turn = batches[at : at + IN_A_ROW]
        found = {name: [run(batch) for batch in turn] for name, run in ways.items()}
        rows += [{name: found[name][i] for name in ways} for i in range(len(turn))]
    told = {name: summary([row[name] for row in rows], [r["full"] for r in rows]) for name in ways}
    for name, each in told.items():
        print(name, each, flush=True)
    kept = ("passes", "ms_per_token")
    return {
        "model": model.manifest.model.name,
        "tokens_each": options.new,
        "batch": at_once,
        "summary": told,
        "batches": [{name: {key: row[name][key] for key in kept} for name in ways} for row in rows],
    }


def read_prompts(model: Model, options: argparse.Namespace) -> list[str]:
    """The lines of `--prompts`, at most `--most`; with `--chat` each in the model's template."""
    lines = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
    lines = lines[: options.most]
    if not options.chat:
        return lines
    return [model.render([{"role": "user", "content": line}]) for line in lines]


def generated(model: Model, new: int, how: dict[str, Any], prompts: list[str]) -> dict[str, Any]:
    """Tokens of some prompts, and the time of one of each; the first ones' time is left out."""
    result = model.generate(prompts, max_new_tokens=new, ignore_eos=True, **how)
    count = sum(len(each.token_ids) for each in result.prompts)
    ms = count / result.tokens_per_second * 1e3 - result.time_to_first_token_ms
    return {
        "token_ids": [each.token_ids for each in result.prompts],
        "passes": sum(each.passes for each in result.prompts),
        "ms_per_token": ms * len(prompts) / (count - len(prompts)),
    }


def summary(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, float]:
    """Of a way, over all prompts."""
    both = [
        pair
        for row, full in zip(rows, plain, strict=True)
        for pair in zip(row["token_ids"], full["token_ids"], strict=True)
    ]
    tokens = sum(len(ids) for ids, _ in both)
    ms, full_ms = (float(np.mean([row["ms_per_token"] for row in each])) for each in (rows, plain))
    return {
        "prompts": len(both),
        "equal": sum(ids == full for ids, full in both),
        "ms_per_token": ms,
        "speedup": full_ms / ms,
        "tokens_per_check": tokens / sum(row["passes"] for row in rows),
    }


if __name__ == "__main__":
    main()
