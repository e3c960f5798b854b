"""A draft layer on the TensorRT backend in fp16: `python -m bench.gpu.drafts --out drafts.json`.

Of shapes with random weights: a full step, a round by the number of its drafts and its parts, and
text with drafts whose acceptance is replayed: with `--chain .51 .24`, 51% of the first drafts are
taken, and 24% of the first two. All against full depth in the same run.

What a bundle's own drafts give, on any backend, is `bench.serving.drafts`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.commit import commit
from bench.gpu.clock import replay_time
from bench.gpu.machine import nvidia_smi
from bench.gpu.shapes import SHAPES, RandomGraphs
from bench.gpu.steps import decoding
from bench.gpu.tensorrt import build
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.backends.tensorrt.draft import TensorRtDraft
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.bundle.names import DRAFT_GRAPHS
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime import speculator
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator

CHAINS = [[0.51, 0.24, 0.11, 0.05], [0.49, 0.26, 0.15, 0.09]]
MOST_DRAFTS, WARMUP = 6, 24
Costs = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is asked for, and writes one JSON file after each part of it."""
    options = _parser().parse_args(arguments)
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": {**BACKEND.versions(), "nvidia_smi": nvidia_smi()},
        "settings": {"past": options.past, "rounds": options.rounds, "chains": options.chain},
        "shapes": [],
    }
    for name in options.shapes:
        with tempfile.TemporaryDirectory(prefix="ojfa-gpu-") as folder:
            result["shapes"].append(of_shape(name, Path(folder), options))
            write(options.out, result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    shapes = ["smollm2-135m", "llama2-7b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=60, help="timed rounds of a setting")
    parser.add_argument("--head", type=int, default=0, help="tokens of a head of its own")
    parser.add_argument("--linear", type=int, help="tokens at most of matrix-vector kernels")
    parser.add_argument("--chain", type=float, nargs="+", action="append", help="rates")
    return parser


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes what there is so far."""
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


def of_shape(name: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Builds a shape with a draft layer and measures it."""
    spec = SHAPES[name]
    length = options.past + (MOST_DRAFTS + 1) * (WARMUP + options.rounds) + 16
    graphs = RandomGraphs(spec, directory / "graphs", length)
    engines, drafts = opened(graphs, directory, options.head)
    if options.linear is not None:
        engines.most_linear_tokens = drafts.most_linear_tokens = options.linear
    plain = Session(spec, engines, 1, length)
    session = Session(spec, engines, 1, length, drafts=drafts)
    prompt = np.random.default_rng(1).integers(0, spec.vocab_size, options.past).tolist()
    for each in (plain, session):
        each.advance(prompt)
    full = decoding(plain, "full", options.past, options.rounds)
    median = float(np.median(full))
    print(f"{name}: a full step {median:.3f} ms", flush=True)
    parts = device_times(engines, session, options.past)
    rounds = [round_times(session, options, count) for count in range(MOST_DRAFTS + 1)]
    costs = costs_of(median, parts, rounds)
    print(f"  costs: {costs}", flush=True)
    chains = options.chain or CHAINS
    texts = [text for rates in chains for text in replayed(session, options, rates, costs)]
    again = decoding(plain, "full", options.past, options.rounds)
    both = float(np.median([*full, *again]))
    for text in texts:
        text["speedup"] = both / text["ms_per_token"]
        said = f"{text['tokens_per_check']:.2f} tokens a check, {text['ms_per_token']:.3f} ms"
        print(f"  {text['rates']}, {text['drafts']} drafts: {said}, {text['speedup']:.2f}x")
    return {
        "shape": name,
        "head": options.head or spec.vocab_size,
        "most_linear_tokens": engines.most_linear_tokens,
        "full_ms_median": both,
        "full_ms": [*full, *again],
        "parts_us": parts,
        "rounds": rounds,
        "costs": costs,
        "texts": texts,
    }


def opened(
    graphs: RandomGraphs, directory: Path, head: int
) -> tuple[TensorRtEngines, TensorRtDraft]:
    """Writes, builds and opens a model and its draft layer."""
    graphs.write()
    plans, seconds = build(graphs.spec, directory)
    layer = graphs.draft(head)
    files = {name: directory / "engines" / f"{name}.json" for name in DRAFT_GRAPHS}
    for name, file in files.items():
        BACKEND.build_engine(
            layer.spec_within(graphs.spec), directory / "graphs" / f"{name}.onnx", file
        )
    print(f"built: {seconds}", flush=True)
    engines = BACKEND.open_engines(graphs.spec, graphs.directory, plans, graphs.rotary)
    assert isinstance(engines, TensorRtEngines)
    engines.load_blocks(graphs.spec.blocks)
    return engines, TensorRtDraft(engines, graphs.opened_draft(layer, files))


def device_times(engines: TensorRtEngines, session: Session, past: int) -> dict[str, float]:
    """Microseconds on the device of a chain of so many drafts, and of a check of so many tokens."""
    recorder, times = engines.device.recorder, {}
    for count in range(MOST_DRAFTS + 1):
        for _ in range(3):  # run, recorded, replayed
            with launches(engines) as recorded:
                session.propose_and_complete([[1]], [count])
            session.rewind(past)
        for name, graph in zip(["chain", "check"][not count :], recorded, strict=True):
            engines.device.synchronize()
            drafts = count if name == "chain" else count + 1
            times[f"{name} {drafts}"] = round(replay_time(engines.device, graph), 2)
            engines.mailbox.reset()  # the replayed answers are nobody's
    assert recorder.newest is not None
    print("  on the device, us:", times, flush=True)
    return times


@contextmanager
def launches(engines: TensorRtEngines) -> Iterator[list[Any]]:
    """The recordings that are launched meanwhile."""
    recorder, found = engines.device.recorder, []

    def noting(launch: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any) -> None:
            launch(*arguments)
            found.append(recorder.newest)

        return noted

    names = ("_launch", "replay")
    ways: dict[str, Any] = {name: noting(getattr(recorder, name)) for name in names}
    with patch.multiple(recorder, **ways):
        yield found


def round_times(session: Session, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Milliseconds of a round of so many drafts, of which none is taken, and all but the last."""
    row: dict[str, Any] = {"drafts": count}
    for name, taken in (("none", 0), ("most", max(0, count - 1))):
        samples = []
        for turn in range(WARMUP + options.rounds):
            start = time.perf_counter()
            before = session.lengths[0]
            session.propose_and_complete([[1]], [count])
            session.rewind(before + 1 + taken)
            if turn >= WARMUP:
                samples.append((time.perf_counter() - start) * 1e3)
        session.rewind(options.past)
        row[f"{name}_taken_ms_median"] = float(np.median(samples))
        row[f"{name}_taken_ms"] = [round(sample, 4) for sample in samples]
    shown = {key: round(row[key], 3) for key in row if key.endswith("median")}
    print(f"  round of {count}: {shown}", flush=True)
    return row


def costs_of(full: float, parts: dict[str, float], rounds: list[dict[str, Any]]) -> Costs:
    """What `Speculation` wants to know, over a full step: a line through the rounds' times."""
    counts = np.arange(1, MOST_DRAFTS + 1)
    times = np.array([rounds[count]["none_taken_ms_median"] for count in counts]) / full
    slope, start = np.polyfit(counts, times, 1)
    chains = [parts[f"chain {count}"] for count in counts]
    draft = float(np.polyfit(counts, chains, 1)[0]) / 1e3 / full
    check = max(0.0, float(slope) - draft)
    return {
        "draft_cost": round(draft, 4),
        "check_cost": round(check, 4),
        "round_cost": round(max(0.0, float(start) - 1), 4),
    }


def replayed(
    session: Session, options: argparse.Namespace, rates: list[float], costs: Costs
) -> list[dict[str, Any]]:
    """Text whose drafts are taken at some rates, by the number of drafts; 0 for adapted ones."""
    texts = []
    for count in (*range(1, MOST_DRAFTS + 1), 0):
        speculation = Speculation(0, count or None, **costs)
        generator = [np.random.default_rng(0)]
        decoder = Speculator(session, speculation, Sampling(), generator)
        tokens, start, pending = 0, 0.0, [[1]]
        with taken_at(rates):
            for turn in range(WARMUP + options.rounds):
                if turn == WARMUP:
                    tokens, start = 0, time.perf_counter()
                chosen = decoder.step(pending, [MOST_DRAFTS + 2])
                tokens += len(chosen[0])
                pending = [[chosen[0][-1].id]]
            seconds = time.perf_counter() - start
        session.rewind(options.past)
        texts.append(
            {
                "rates": rates,
                "drafts": count or "adapted",
                "tokens_per_check": tokens / options.rounds,
                "ms_per_token": seconds * 1e3 / tokens,
            }
        )
    return texts


@contextmanager
def taken_at(rates: list[float]) -> Iterator[None]:
    """Has drafts be taken as often as named, whatever the model says; by a seeded draw."""
    rng = np.random.default_rng(7)

    def forced(draft: Sequence[int], best: list[int]) -> list[int]:
        drawn = rng.random()
        return best[: sum(drawn < rate for rate in rates[: len(draft)]) + 1]

    with patch.object(speculator, "agreeing", forced):
        yield


if __name__ == "__main__":
    main()
