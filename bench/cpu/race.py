"""Interleaved timing: contestants take turns in short bursts, so that noise hits all alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from bench.cpu.contestants import Contestant

# Idle threads of a pool spin for some milliseconds before they sleep; the next contestant starts
# only when they no longer hold its cores.
SETTLE_SECONDS = 0.05


def race(
    contestants: Sequence[Contestant], prompt: list[int], rounds: int, burst: int, warmup: int
) -> Iterator[tuple[str, list[float]]]:
    """Times every contestant in every round.

    Args:
        contestants: Who takes part.
        prompt: Token ids in the cache when a burst starts.
        rounds: How often each has its turn.
        burst: Timed tokens of a turn.
        warmup: Tokens before them, untimed: they bring the weights back into the caches.

    Yields:
        A contestant's name and the seconds of each token of one burst.
    """
    for contestant in contestants:
        contestant.start(prompt)
    for turn in range(rounds):
        # Each round starts with another one, so that none always follows the same neighbour.
        shift = turn % len(contestants)
        for contestant in (*contestants[shift:], *contestants[:shift]):
            time.sleep(SETTLE_SECONDS)
            yield contestant.name, _burst(contestant, burst, warmup)


def _burst(contestant: Contestant, burst: int, warmup: int) -> list[float]:
    contestant.rewind()
    seconds = []
    for index in range(warmup + burst):
        start = time.perf_counter()
        contestant.step()
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    contestant.rewind()
    return seconds
