"""Requests together against each alone: `python -m bench.serving.equality BUNDLE --out equal.json`.

Random requests, of mixed exits, policies, speculation, sampling and stops, join an engine with few
slots and little memory in bursts; some are cancelled. Each must give the tokens that it gives
alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ojfa_export
from bench.serving.result import write_result
from bench.serving.throughput import TEXT
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.engine.budget import page_bytes
from ojfa_export.engine.engine import Engine
from ojfa_export.engine.request import Request

SLOTS, PAGES = 12, 40
LONGEST_PROMPT, MOST_TOKENS = 120, 24


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        prompt: Token ids.
        options: How to generate.
        cancel_after: Tokens after which it is cancelled; None where it isn't.
    """

    prompt: list[int]
    options: GenerationOptions
    cancel_after: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything, prints the figures and writes them; 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    model = ojfa_export.load(options.bundle)
    cases = random_cases(model, options.requests, random.Random(options.seed))
    together, preemptions = run_together(model, cases, random.Random(options.seed + 1))
    different, compared = [], 0
    for number, (case, request) in enumerate(zip(cases, together, strict=True)):
        expected = model.generate([case.prompt], case.options).prompts[0]
        result = request.result()
        count = len(result.token_ids)
        compared += count
        whole = result.finish_reason == "cancelled" or count == len(expected.token_ids)
        if not whole or list(result.token_ids) != list(expected.token_ids[:count]):
            different.append(number)
    reasons = Counter(request.result().finish_reason for request in together)
    figures = {
        f"of {len(cases)} requests, those whose tokens differ from each alone (0)": len(different),
        "tokens compared": compared,
        "requests sent back for want of pages": preemptions,
    }
    samples = {"different": different, "finish_reasons": dict(reasons), "seed": options.seed}
    write_result(options.out, model, figures, samples)
    return 1 if different else 0


def random_cases(model: ojfa_export.Model, count: int, rng: random.Random) -> list[Case]:
    """Requests of all kinds; every fourth prompt begins like others."""
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:40_000]).ids
    blocks = model.blocks
    policy = ExitPolicy(exits=(blocks // 2, 3 * blocks // 4), measure="top", thresholds=(0.5, 0.4))
    cases = []
    for _ in range(count):
        length = rng.randint(1, LONGEST_PROMPT)
        start = 0 if rng.random() < 0.25 else rng.randrange(len(ids) - length)
        options: dict[str, Any] = {
            "max_new_tokens": rng.randint(1, MOST_TOKENS),
            "ignore_eos": rng.random() < 0.5,
            "exit": rng.choice([rng.randint(1, blocks), blocks // 2, "full", policy]),
        }
        if rng.random() < 0.2:
            options |= {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(100)}
        if rng.random() < 0.2:
            options |= {"stop": rng.choice([" ", "\n", "self", ")"])}
        if rng.random() < 0.2:
            options |= {"stop_token_ids": rng.sample(ids, 5)}
        if rng.random() < 0.1:
            options |= {"exit": "full", "speculate": True}
        elif rng.random() < 0.1:
            options |= {"repetition_penalty": 1.2}
        cancel = rng.randint(0, 12) if rng.random() < 0.15 else None
        cases.append(Case(ids[start : start + length], GenerationOptions(**options), cancel))
    return cases


def run_together(
    model: ojfa_export.Model, cases: Sequence[Case], rng: random.Random
) -> tuple[list[Request], int]:
    """The requests as they ended, and how many were sent back for want of pages."""
    requests: list[Request] = []
    budget = PAGES * page_bytes(model.spec)
    with Engine(model, max_sequences=SLOTS, kv_cache_bytes=budget, max_queue=len(cases)) as engine:
        waiting = list(cases)
        while waiting:
            burst = [waiting.pop(0) for _ in range(min(len(waiting), rng.randint(1, 40)))]
            begun = [engine.submit(case.prompt, case.options) for case in burst]
            requests += begun
            for case, request in zip(burst, begun, strict=True):
                if case.cancel_after is not None:
                    for count, _ in enumerate(request, 1):
                        if count > case.cancel_after:
                            break
                    request.cancel()
            time.sleep(rng.random() / 50)
        for request in requests:
            request.result()
        return requests, engine.stats().preemptions


if __name__ == "__main__":
    sys.exit(main())
