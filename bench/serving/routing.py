"""Which machine a request goes to, in a simulation of many (`bench.serving.scaling`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bench.serving.pass_times import PassTimes
from bench.serving.simulated import NO_PREFIX, SLOTS, Asked, Machine, served

# A machine that has the prefix is taken up to this much more load than the mean, and a request's.
MORE_LOAD, REQUEST_LOAD = 1.25, 1000


class Router(Protocol):
    """Chooses machines."""

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        """The machine for a request that comes now."""


class AtRandom:
    """Any machine."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        return int(self._rng.integers(len(machines)))


class TwoChoices:
    """Of two machines at random (now and then the same) the one with fewer requests."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        pair = [int(index) for index in self._rng.integers(len(machines), size=2)]
        for index in pair:
            machines[index].advance(each.at)
        return min(pair, key=lambda index: machines[index].requests)


class FewestRequests:
    """The machine with the fewest requests, known exactly at every moment."""

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        for machine in machines:
            machine.advance(each.at)
        return min(range(len(machines)), key=lambda index: machines[index].requests)


class LeastLoaded:
    """The machine with the fewest tokens left to run, known exactly at every moment."""

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        return least_loaded(range(len(machines)), each.at, machines)


class ByDepth:
    """Shallow requests have machines of their own; the least loaded of them is taken.

    Args:
        shallow: How many machines are for shallow requests.
        misjudged: Share of requests whose depth is expected wrongly.
        seed: Of those.
    """

    def __init__(self, shallow: int, misjudged: float = 0.0, seed: int = 0) -> None:
        self._shallow, self._misjudged = shallow, misjudged
        self._rng = np.random.default_rng(seed)

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        shallow = each.shallow != (self._rng.random() < self._misjudged)
        theirs = range(self._shallow) if shallow else range(self._shallow, len(machines))
        return least_loaded(theirs, each.at, machines)


class ByPrefix:
    """A machine that was sent the same system prompt lately, unless all of them are busy.

    The router remembers what it sent where, and takes a prefix to be gone when as many requests as
    a machine has slots went there since.
    """

    def __init__(self) -> None:
        self._sent: dict[int, OrderedDict[int, int]] = {}  # by prefix, by machine: its count then
        self._counts: dict[int, int] = {}  # requests by machine

    def choose(self, each: Asked, machines: Sequence[Machine]) -> int:
        best = least_loaded(range(len(machines)), each.at, machines)
        if each.prefix != NO_PREFIX:
            sent = self._sent.setdefault(each.prefix, OrderedDict())
            for index in [i for i, then in sent.items() if self._counts[i] - then > SLOTS]:
                del sent[index]
            mean = sum(machine.load for machine in machines) / len(machines)
            if sent:
                having = min(sent, key=lambda index: machines[index].load)
                if machines[having].load <= MORE_LOAD * mean + REQUEST_LOAD:
                    best = having
            sent[best] = self._counts.get(best, 0) + 1
        self._counts[best] = self._counts.get(best, 0) + 1
        return best


def least_loaded(indices: Sequence[int], now: float, machines: Sequence[Machine]) -> int:
    """The machine among some that has the least to run."""
    for index in indices:
        machines[index].advance(now)
    return min(indices, key=lambda index: machines[index].load)


class Limits(NamedTuple):
    """What a request must keep to be counted.

    Attributes:
        first: Milliseconds to its first token.
        between: Milliseconds between its tokens, 99% of them.
    """

    first: float = 200.0
    between: float = 15.0


class Goodput(NamedTuple):
    """What of a span of arrivals kept its limits.

    Attributes:
        rate: Requests that came, a second.
        good: Of them those within both limits, a second.
        late: Share above the limit to the first token.
        slow: Share above the limit between tokens.
        first_p50: Milliseconds.
        first_p99: Milliseconds.
        cached: Share of prompts' tokens that were in a cache.
    """

    rate: float
    good: float
    late: float
    slow: float
    first_p50: float
    first_p99: float
    cached: float

    @property
    def share(self) -> float:
        """Of the requests, those within both limits."""
        return self.good / self.rate if self.rate else 1.0


def serve(
    asked: Sequence[Asked],
    count: int,
    router: Router,
    times: PassTimes,
    make: Callable[..., Machine] = Machine,
) -> list[Machine]:
    """Sends all requests to machines, and runs them to their ends."""
    machines = [make(times, seed=index) for index in range(count)]
    for each in asked:
        each.machine = router.choose(each, machines)
        machines[each.machine].advance(each.at)
        machines[each.machine].submit(each)
    for machine in machines:
        machine.advance()
    return machines


def goodput(
    asked: Sequence[Asked], machines: Sequence[Machine], span: tuple[float, float], limits: Limits
) -> Goodput:
    """Counts the requests that come in a span of time."""
    ends = [np.array(machine.ends) for machine in machines]
    some = [each for each in asked if span[0] <= each.at < span[1]]
    first, slow = np.empty(len(some)), np.empty(len(some), bool)
    for index, each in enumerate(some):
        got = served(each, ends[each.machine])
        first[index] = got.first
        slow[index] = len(got.between) > 0 and high(got.between) > limits.between
    late, seconds = first > limits.first, span[1] - span[0]
    return Goodput(
        rate=len(some) / seconds,
        good=float(np.sum(~(late | slow))) / seconds,
        late=float(np.mean(late)),
        slow=float(np.mean(slow)),
        first_p50=float(np.percentile(first, 50)),
        first_p99=float(np.percentile(first, 99)),
        cached=sum(each.cached for each in some) / sum(each.prompt for each in some),
    )


def high(samples: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """The 99th percentile, as NumPy's."""
    ordered, place = np.sort(samples), 0.99 * (len(samples) - 1)
    low = int(place)
    above = ordered[min(low + 1, len(ordered) - 1)]
    return float(ordered[low] + (place - low) * (above - ordered[low]))
