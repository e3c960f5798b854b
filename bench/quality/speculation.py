"""Greedy speculation against full depth, token by token, on trained checkpoints' bundles.

python -m bench.quality.speculation --case demo demo.ojfa calibration/text/code.txt \
    --out bench/results/lossless.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ojfa_export.decoding.confidence import confidence
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import MAX_DRAFT, Speculation
from ojfa_export.planning.machine import describe_machine
from ojfa_export.runtime.model import Model, load
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator

PROMPT_TOKENS, NEW_TOKENS = 64, 200
# Logits that differ by less may be ranked either way by sums in another order (tests/tolerances).
NEAR_TIE = 2e-4


@dataclass
class Result:
    """One draft exit of one bundle.

    Attributes:
        draft_length: Fixed, or None where it was adapted.
        compared: Tokens that were compared, those after a tie left out.
        ties: Texts that went another way where two logits differ by less than NEAR_TIE.
        different: Tokens that differ where they don't: what must be 0.
        draft_cost: A drafted token over a full step, measured; check_cost: see `Speculation`.
        speedup: Seconds of full depth over seconds of speculation, all texts.
    """

    draft_exit: int
    draft_length: int | None
    compared: int
    ties: int
    different: int
    draft_cost: float
    check_cost: float
    acceptance_rate: float
    drafted: int
    accepted: int
    tokens_per_full_pass: float
    plain_ms_per_token: float
    speculative_ms_per_token: float
    speedup: float


def main() -> None:
    """Runs every case and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("NAME", "BUNDLE", "TEXT")
    parser.add_argument("--case", nargs=3, action="append", required=True, metavar=names)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--exits", type=float, nargs="+", default=[0.5, 0.9], help="of the blocks")
    parser.add_argument(
        "--draft", type=int, help="tokens per draft, so that all is drafted; else adapted"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    for name, bundle, text in arguments.case:
        model = load(bundle)
        ids = model.tokenizer.encode(Path(text).read_text(encoding="utf-8")).ids
        exits = sorted({max(1, int(share * model.blocks)) for share in arguments.exits})
        results = [compare(model, ids, e, arguments.draft, arguments.tokens) for e in exits]
        cases[name] = {
            "blocks": model.blocks,
            "exits": [asdict(result) for result in results],
            "check_ms": {str(exit): check_milliseconds(model, ids, exit) for exit in exits},
        }
        print(name, json.dumps(cases[name], indent=1), flush=True)
    document = {"machine": describe_machine(), "cases": cases}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def compare(model: Model, ids: list[int], exit: int, draft: int | None, count: int) -> Result:
    """Continues pieces of a text both ways, taking turns, until `count` tokens are compared."""
    draft_cost, check_cost = measure_costs(model, ids[:PROMPT_TOKENS], exit)
    speculation = Speculation(exit, draft, draft_cost, check_cost)
    session, plain = (model.session(1, PROMPT_TOKENS + NEW_TOKENS) for _ in range(2))
    compared = ties = different = 0
    seconds = np.zeros(2)
    tokens = 0
    starts = np.random.default_rng(0).permutation(len(ids) - PROMPT_TOKENS)
    for start in starts.tolist():
        prompt = ids[start : start + PROMPT_TOKENS]
        (expected, margins), plain_seconds = timed(partial(full_depth, plain, prompt))
        given, speculative_seconds = timed(partial(speculative, session, prompt, speculation))
        seconds += plain_seconds, speculative_seconds
        tokens += NEW_TOKENS
        agreeing = next((i for i in range(NEW_TOKENS) if given[i] != expected[i]), NEW_TOKENS)
        compared += agreeing
        if agreeing < NEW_TOKENS:
            tied = margins[agreeing] < NEAR_TIE
            ties, different = ties + tied, different + (not tied)
        if compared >= count:
            break
    stats = session.stats
    plain_ms, speculative_ms = (seconds / tokens * 1e3).tolist()
    return Result(
        exit,
        draft,
        compared,
        ties,
        different,
        draft_cost,
        check_cost,
        stats.acceptance_rate,
        stats.drafted,
        stats.accepted,
        stats.tokens_per_full_pass,
        plain_ms,
        speculative_ms,
        float(seconds[0] / seconds[1]),
    )


def full_depth(session: Session, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens one at a time, and by how much each logit is above the second."""
    session.rewind(0)
    tokens, margins, new = [], [], prompt
    for _ in range(NEW_TOKENS):
        logits = session.advance(new)[0]
        best = int(logits.argmax())
        first = logits[best]
        logits[best] = -np.inf
        tokens.append(best)
        margins.append(float(first - logits.max()))
        new = [best]
    return tokens, margins


def speculative(session: Session, prompt: list[int], speculation: Speculation) -> list[int]:
    """Greedy tokens by speculation."""
    session.rewind(0)
    speculator = Speculator(session, speculation, Sampling(), [np.random.default_rng(0)])
    tokens: list[int] = []
    new = prompt
    while len(tokens) < NEW_TOKENS:
        [chosen] = speculator.step([new], [NEW_TOKENS - len(tokens)])
        tokens += [token.id for token in chosen]
        new = tokens[-1:]
    return tokens


def measure_costs(model: Model, prompt: list[int], exit: int) -> tuple[float, float]:
    """A drafted token's time, and what a token adds to a pass that checks, over a full step's."""
    session = model.session(1, len(prompt) + MAX_DRAFT + 1)
    session.advance(prompt)

    def step(count: int, depth: int) -> None:
        session.advance([7] * count, depth, every_position=True)

    def rewound(count: int, depth: int) -> float:
        return median_ms(lambda: step(count, depth), lambda: session.rewind(len(prompt)))

    full = rewound(1, model.blocks)
    # Of the tokens that are checked, the first `exit` blocks are behind them.
    more = (rewound(MAX_DRAFT + 1, model.blocks) - rewound(MAX_DRAFT + 1, exit)) / full
    one = 1 - rewound(1, exit) / full
    return rewound(1, exit) / full, max(0.0, (more - one) / MAX_DRAFT)


def check_milliseconds(model: Model, ids: list[int], exit: int) -> dict[str, float]:
    """What asking the exit head costs: the head on one row, and the confidence of its logits."""
    session = model.session(1, PROMPT_TOKENS)
    logits = session.advance(ids[:PROMPT_TOKENS], exit)
    hidden = np.random.default_rng(0).normal(size=(1, model.spec.hidden_size)).astype(np.float32)
    result = {"head": median_ms(lambda: model.engines.logits(hidden, 1))}
    result["top"] = median_ms(lambda: confidence(logits, "top"))
    result["margin"] = median_ms(lambda: confidence(logits, "margin"))
    result["entropy"] = median_ms(lambda: confidence(logits, "entropy"))
    session.rewind(32)
    session.deepen()
    result["full_step"] = median_ms(lambda: session.advance([7]), lambda: session.rewind(32))
    return result


def median_ms(call: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    """Of 60 calls, after 10 that don't count."""
    times = []
    for turn in range(70):
        _, seconds = timed(call)
        after()
        if turn >= 10:
            times.append(seconds * 1e3)
    return float(np.median(times))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
