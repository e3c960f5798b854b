"""From one machine to many, simulated on measured times of passes.

python -m bench.serving.scaling --out bench/results/scaling.json --picture bench/results/scaling.png

First the simulation against what was measured (bench/results/gpu-h200-serving-llama2-7b.json); then
goodput, which is requests a second that keep a limit to the first token and one between tokens:
of one machine with some requests at half depth, and of 8 and 64 machines by ways of routing.
Nothing but NumPy runs; it takes about two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from bench.gpu.arrivals import OUTPUT, PROMPT, Times, poisson, summary
from bench.serving.pass_times import PassTimes
from bench.serving.routing import (
    AtRandom,
    ByDepth,
    ByPrefix,
    FewestRequests,
    Goodput,
    LeastLoaded,
    Limits,
    Router,
    TwoChoices,
    goodput,
    serve,
)
from bench.serving.simulated import MEASURED_SHARE, NO_PREFIX, PREFIX, SPREAD, Asked, Machine
from ojfa_export.engine.scheduler import FILLED_SHARE

MEASURED = Path(__file__).parents[1] / "results" / "gpu-h200-serving-llama2-7b.json"
VALIDATION_SEEDS = 5
# Shares at half depth, requests a second of a machine, and what of them must keep the limits.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32)
RATES_ALL_SHALLOW = (*RATES, 36, 40, 44, 48)
KEPT = 0.95
# Milliseconds between tokens, p99, that capacities are looked up for.
BETWEEN = (9.0, 10.0, 11.0, 12.0, 15.0, 20.0)
# What pieces may add to a step, and requests a second.
PIECE_SHARES, SHARE_RATES = (0.5, 0.6, 0.7, FILLED_SHARE, 1.0), (13.5, 16.8)
# Seconds of arrivals, of which the first don't count.
ONE_MACHINE, EIGHT, MANY = (70.0, 10.0), (16.0, 5.0), (8.0, 3.0)
# Tokens of a request's own after a system prompt.
OWN = (64, 512)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates, writes the JSON file and draws it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--first-ms", type=float, default=200.0, help="limit to the first token")
    parser.add_argument("--between-ms", type=float, default=15.0, help="limit between tokens, p99")
    options = parser.parse_args(arguments)
    limits, begin = Limits(options.first_ms, options.between_ms), time.process_time()
    result: dict[str, Any] = {"commit": commit(), "limits": limits._asdict(), "spread": SPREAD}
    result["validation"] = validation()
    result["one_machine"] = one_machine(SHARES, limits)
    # As if the engine learnt from times without any spread.
    result["learning_exactly"] = one_machine((0.0, 0.5), limits, partial(Machine, spread=0.0))
    result["shares"] = list(by_share())
    result["larger_share"] = one_machine((0.0, 0.5), limits, partial(Machine, share=FILLED_SHARE))
    capacity = {row["shallow"]: row["capacity"] or RATES[-1] for row in result["one_machine"]}
    result["depth"] = list(by_depth(capacity, limits))
    result["prefix"] = list(by_prefix(limits))
    result["seconds"] = time.process_time() - begin
    options.out.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(f"{result['seconds']:.0f} s")
    if options.picture:
        from bench.serving.scaling_plot import draw

        draw(result, options.picture)


def validation() -> list[dict[str, Any]]:
    """Figures of the simulation beside those measured, on the same requests; means over seeds."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["ojfa_export"]
    cases = {
        "saturated": (float("inf"), 7, False),
        "half leave at half depth": (float("inf"), 7, True),
        "arrivals": (measured["arrivals"]["rate"], 8, False),
    }
    rows = []
    for name, (rate, seed, half) in cases.items():
        runs = [replayed(rate, seed, half, spread) for spread in range(VALIDATION_SEEDS)]
        exact = replayed(rate, seed, half, None)
        for what, pick in FIGURES.items():
            real, simulated = pick(measured[name]), float(np.mean([pick(run) for run in runs]))
            row = {"case": name, "what": what, "measured": real, "simulated": simulated}
            rows.append({**row, "ratio": simulated / real, "without_spread": pick(exact)})
            print(rows[-1])
    return rows


FIGURES: dict[str, Callable[[Any], float]] = {
    "tokens a second": lambda run: run["tokens_per_second"],
    "passes": lambda run: run["passes"],
    "p50 to the first token, ms": lambda run: run["first_token_ms"]["p50"],
    "p99 to the first token, ms": lambda run: run["first_token_ms"]["p99"],
    "share with the first token within 200 ms": lambda run: float(
        np.mean(np.array(run["first_token_samples_ms"]) <= 200)
    ),
    "p50 between tokens, ms": lambda run: run["between_tokens_ms"]["p50"],
    "p99 between tokens, ms": lambda run: run["between_tokens_ms"]["p99"],
}


def by_share() -> Iterator[dict[str, Any]]:
    """What the time that pieces may add does to the measured arrivals; means over seeds."""
    for rate, share in product(SHARE_RATES, PIECE_SHARES):
        runs = [replayed(rate, 8, False, seed, share) for seed in range(VALIDATION_SEEDS)]
        figures = {
            what: float(np.mean([pick(run) for run in runs])) for what, pick in FIGURES.items()
        }
        yield {"rate": rate, "share": share, **figures}


def replayed(
    rate: float, seed: int, half: bool, spread_seed: int | None, share: float = MEASURED_SHARE
) -> dict[str, Any]:
    """The requests of `bench.gpu.serving` on one simulated machine."""
    came = poisson(rate, 192, 32000, seed=seed)
    asked = [
        Asked(each.at, len(each.prompt), each.tokens, half and index % 2 == 1)
        for index, each in enumerate(came)
    ]
    spread = 0.0 if spread_seed is None else SPREAD
    machine = Machine(
        PassTimes(), keeps_prefixes=False, spread=spread, share=share, seed=spread_seed or 0
    )
    for each in asked:
        machine.advance(each.at)
        machine.submit(each)
    machine.advance()
    times = [Times(each.at, machine.ends[each.first : each.last + 1]) for each in asked]
    return {**summary(times), "passes": len(machine.ends)}


def arrivals(
    rate: float,
    seconds: float,
    seed: int,
    shallow: float = 0.0,
    prefixed: float = 0.0,
    prefixes: int = 1,
) -> list[Asked]:
    """Requests at random moments, with prompts and outputs as in `bench.gpu.arrivals`.

    Args:
        rate: Requests a second.
        seconds: For which they come.
        seed: Of all that is random.
        shallow: Share that leaves at half depth.
        prefixed: Share that begins with a system prompt, followed by `OWN` tokens.
        prefixes: System prompts that there are, all asked for alike.
    """
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.5) + 100))
    count = int(np.searchsorted(at, seconds))
    prompts, tokens = (rng.integers(low, high + 1, count) for low, high in (PROMPT, OUTPUT))
    leaves, begins = rng.random(count) < shallow, rng.random(count) < prefixed
    prompts = np.where(begins, PREFIX + rng.integers(OWN[0], OWN[1] + 1, count), prompts)
    which = np.where(begins, rng.integers(prefixes, size=count), NO_PREFIX)
    columns = (each.tolist() for each in (at[:count], prompts, tokens, leaves, which))
    return [Asked(*row) for row in zip(*columns, strict=True)]


def run(
    asked: list[Asked], machines: int, router: Router, span: tuple[float, float], limits: Limits
) -> Goodput:
    """Serves requests and counts those that come after the first seconds."""
    done = serve(asked, machines, router, PassTimes())
    return goodput(asked, done, (span[1], span[0]), limits)


def one_machine(
    shares: Sequence[float], limits: Limits, make: Callable[..., Machine] = Machine
) -> list[dict[str, Any]]:
    """Goodput against the rate, by the share at half depth; capacities at other limits too."""
    rows, span = [], (ONE_MACHINE[1], ONE_MACHINE[0])
    several = [limits, *(limits._replace(between=each) for each in BETWEEN)]
    for shallow in shares:
        rates = RATES_ALL_SHALLOW if shallow == 1 else RATES
        curves: list[list[Goodput]] = [[] for _ in several]
        for rate in rates:
            asked = arrivals(rate, ONE_MACHINE[0], rate, shallow)
            done = serve(asked, 1, LeastLoaded(), PassTimes(), make)
            for curve, each in zip(curves, several, strict=True):
                curve.append(goodput(asked, done, span, each))
        found = [capacity_of(rates, curve) for curve in curves]
        row = {
            "shallow": shallow,
            "capacity": found[0],
            "most_good": max(each.good for each in curves[0]),
            "capacity_by_between": dict(zip(map(str, BETWEEN), found[1:], strict=True)),
        }
        print(row, flush=True)
        points = zip(rates, curves[0], strict=True)
        rows.append({**row, "curve": [{"asked": r, **c._asdict()} for r, c in points]})
    return rows


def capacity_of(rates: Sequence[float], curve: Sequence[Goodput]) -> float | None:
    """The rate at which the share that keeps the limits falls below `KEPT`, on a line.

    Returns:
        None where that is not between two of the rates.
    """
    for index, each in enumerate(curve):
        if each.share < KEPT:
            if not index:
                return None
            before = curve[index - 1]
            part = (before.share - KEPT) / (before.share - each.share)
            return rates[index - 1] + part * (rates[index] - rates[index - 1])
    return None


# Routing that knows nothing of a request.
BY_LOAD: dict[str, Callable[[], Router]] = {
    "at random": AtRandom,
    "fewer of two": TwoChoices,
    "fewest requests": FewestRequests,
    "least loaded": LeastLoaded,
}


def machines_for_shallow(machines: int, share: float, capacity: dict[float, float]) -> int:
    """Machines for shallow requests, by what one of all shallow and one of all full can take."""
    shallow, full = share / capacity[1.0], (1 - share) / capacity[0.0]
    return min(max(round(machines * shallow / (shallow + full)), 1), machines - 1)


def by_depth(capacity: dict[float, float], limits: Limits) -> Iterator[dict[str, Any]]:
    """Machines of their own for shallow requests, against routing by load or by chance."""
    for machines, span, share, rates in (
        (8, EIGHT, 0.25, (16, 20)),
        (8, EIGHT, 0.5, (16, 20, 24, 28)),
        (8, EIGHT, 0.75, (20, 28)),
        (64, MANY, 0.5, (22,)),
    ):
        own = machines_for_shallow(machines, share, capacity)
        routers: dict[str, Callable[[], Router]] = {**BY_LOAD, "by depth": partial(ByDepth, own)}
        if share == 0.5:
            routers["by depth, 10% misjudged"] = partial(ByDepth, own, 0.1)
        about = {"machines": machines, "shallow": share, "for_shallow": own}
        make = partial(arrivals, shallow=share)
        yield from compared(about, routers, rates, span, limits, make)


def by_prefix(limits: Limits) -> Iterator[dict[str, Any]]:
    """Requests with a system prompt go where it is known, or by load, or by chance."""
    routers: dict[str, Callable[[], Router]] = {**BY_LOAD, "by prefix": ByPrefix}
    for machines, span, share, prefixes, rates in (
        (8, EIGHT, 0.9, 16, (18, 22, 26)),
        (8, EIGHT, 0.9, 400, (14, 18, 22)),
        (64, MANY, 0.9, 400, (18,)),
    ):
        about = {"machines": machines, "prefixed": share, "prefixes": prefixes}
        make = partial(arrivals, prefixed=share, prefixes=prefixes)
        yield from compared(about, routers, rates, span, limits, make)


def compared(
    about: dict[str, Any],
    routers: dict[str, Callable[[], Router]],
    rates: Sequence[float],
    span: tuple[float, float],
    limits: Limits,
    make: Callable[[float, float, int], list[Asked]],
) -> Iterator[dict[str, Any]]:
    """The same arrivals under each routing, at rates of each machine."""
    machines = int(about["machines"])
    for name, router in routers.items():
        curve = []
        for rate in rates:
            asked = make(machines * rate, span[0], int(rate))
            curve.append(run(asked, machines, router(), span, limits))
        per = [
            {"asked": rate, "good": each.good / machines, "share": each.share, "late": each.late,
             "slow": each.slow, "first_p50": each.first_p50, "cached": each.cached}
            for rate, each in zip(rates, curve, strict=True)
        ]  # fmt: skip
        row = {**about, "routing": name, "capacity": capacity_of(rates, curve), "curve": per}
        print({key: value for key, value in row.items() if key != "curve"},
              [(each["asked"], round(each["good"], 1)) for each in per], flush=True)  # fmt: skip
        yield row


def rounded(value: Any) -> Any:
    """Figures with four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
