"""Requests as they come to a service, and what their tokens' times say: for every engine alike.

Needs NumPy alone, so that a peer's environment can import it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PROMPT, OUTPUT = (128, 1024), (64, 256)


@dataclass(frozen=True)
class Arrival:
    """A request.

    Attributes:
        at: Seconds after the first may come.
        prompt: Token ids.
        tokens: To generate, whatever they are.
        exit: Blocks to run, or None for all.
    """

    at: float
    prompt: list[int]
    tokens: int
    exit: int | None = None


def poisson(
    rate: float,
    count: int,
    vocabulary: int,
    seed: int = 7,
    prompt: tuple[int, int] = PROMPT,
    output: tuple[int, int] = OUTPUT,
) -> list[Arrival]:
    """Requests at random moments, `rate` a second on average; all at once for an infinite rate."""
    rng = np.random.default_rng(seed)
    at = 0.0
    made = []
    for _ in range(count):
        length, tokens = (int(rng.integers(low, high + 1)) for low, high in (prompt, output))
        ids = rng.integers(3, vocabulary, length).tolist()
        gap = float(rng.exponential(1.0))
        at += gap / rate
        made.append(Arrival(at, ids, tokens))
    return made


@dataclass
class Times:
    """When a request came, and when each of its tokens was there, by `time.perf_counter`."""

    submitted: float
    tokens: list[float]


def summary(times: Sequence[Times]) -> dict[str, Any]:
    """Tokens a second, milliseconds to the first token and between tokens."""
    ends = [each.tokens[-1] for each in times]
    first = [1e3 * (each.tokens[0] - each.submitted) for each in times]
    between = np.concatenate([1e3 * np.diff(each.tokens) for each in times])
    count = sum(len(each.tokens) for each in times)
    seconds = max(ends) - min(each.submitted for each in times)
    return {
        "requests": len(times),
        "tokens": count,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "requests_per_second": len(times) / seconds,
        "first_token_ms": _quantiles(first),
        "between_tokens_ms": _quantiles(between),
        "first_token_samples_ms": np.round(first, 2).tolist(),
    }


def _quantiles(samples: Any) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(samples, q)), 3) for q in (50, 90, 95, 99)}


def wait_and_submit(arrivals: Sequence[Arrival], submit: Callable[[Arrival], None]) -> None:
    """Submits each request when its time has come."""
    start = time.perf_counter()
    for each in arrivals:
        time.sleep(max(0.0, each.at - (time.perf_counter() - start)))
        submit(each)


def described(arrivals: Sequence[Arrival]) -> list[dict[str, Any]]:
    """As JSON holds them."""
    return [asdict(each) for each in arrivals]
