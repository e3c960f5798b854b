"""The engine for services at Llama-2-7B's shape, fp16, TensorRT backend.

    python -m bench.gpu.serving --out serving.json --arrivals arrivals.json
    python -m bench.gpu.serving_vllm --out vllm.json --arrivals arrivals.json     # where vLLM is

Steady decoding of 1 to 64 requests past 512; prompts of 512, one and sixteen at once; all requests
at once, at full depth and with half of them leaving at half depth; and requests that arrive at
random at a share of the rate that was then reached. Weights are random: times depend on shapes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bench.commit import commit
from bench.gpu.arrivals import Arrival, Times, described, poisson, summary, wait_and_submit
from bench.gpu.machine import nvidia_smi
from bench.gpu.shapes import SHAPES, RandomGraphs
from bench.gpu.tensorrt import build
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.decoding.generation_defaults import NO_DEFAULTS
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.engine.engine import Engine
from ojfa_export.engine.request import Request, RequestToken
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.prompts import PromptEncoder

PAST, LENGTH, SEQUENCES = 512, 1408, 64
SHARE = 0.7  # of the rate at which all at once are served


class ShapeModel(Model):
    """A model of random weights: what the engine needs of one, without a bundle.

    Args:
        spec: Its shape.
        engines: Opened.
        length: Tokens of a sequence.
    """

    def __init__(self, spec: ModelSpec, engines: Any, length: int) -> None:
        self.spec, self.engines, self.drafts = spec, engines, None
        words = {f"w{index} ": index for index in range(spec.vocab_size)}
        self.tokenizer = Tokenizer(WordLevel(words, unk_token="w0 "))
        self._prompts = PromptEncoder(self.tokenizer, spec.vocab_size, length)
        model = SimpleNamespace(name="random weights", spec=spec)
        self._described: Any = SimpleNamespace(
            cache=SimpleNamespace(max_length=length),
            model=model,
            generation=NO_DEFAULTS,
            shortcut=SimpleNamespace(exits=None),
        )

    @property
    def manifest(self) -> Any:
        """As far as it is asked."""
        return self._described


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes one JSON file after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arrivals", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 16, 32, 64])
    options = parser.parse_args(arguments)
    spec = SHAPES["llama2-7b"]
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": {**BACKEND.versions(), "nvidia_smi": nvidia_smi()},
    }
    with tempfile.TemporaryDirectory(prefix="ojfa-gpu-") as folder:
        directory = Path(folder)
        graphs = RandomGraphs(spec, directory / "graphs", LENGTH)
        graphs.write()
        plans, _ = build(spec, directory)
        engines = BACKEND.open_engines(spec, directory / "graphs", plans, graphs.rotary)
        engines.load_blocks(spec.blocks)
        with timed(ShapeModel(spec, engines, LENGTH)) as service:
            parts = parts_of(service, options, result)
            for name, part in parts.items():
                result[name] = part()
                options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
                print(name, shown(result[name]), flush=True)


def parts_of(
    service: Timed, options: argparse.Namespace, result: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """What is measured, in this order; the last depends on an earlier result."""
    half = service.spec.blocks // 2
    return {
        "warm-up seconds": lambda: service.warm_up_seconds,
        "steady": lambda: [steady(service, count) for count in options.sequences],
        "prompts": lambda: [prompts(service, count) for count in (1, 16)],
        "saturated": lambda: saturated(service, options.requests, None),
        "half leave at half depth": lambda: saturated(service, options.requests, half),
        "arrivals": lambda: arriving(service, options, result),
    }


@dataclass(frozen=True)
class Timed:
    """An engine that is warm, and when its requests' tokens came.

    Attributes:
        engine: Of one model.
        spec: Of the model.
        times: By request.
        warm_up_seconds: That its warm-up took.
    """

    engine: Engine
    spec: ModelSpec
    times: dict[int, Times]
    warm_up_seconds: float


def steady(service: Timed, count: int) -> dict[str, Any]:
    """Milliseconds of a step: so many requests decode past 512, the time to begin taken away."""
    samples = []
    for turn in range(4):
        few, many = (all_at_once(service, count, PAST, new) for new in (4, 104))
        if turn:
            samples.append((many - few) * 1e3 / 100)
    return {"sequences": count, "ms_median": float(np.median(samples)), "samples_ms": samples}


def prompts(service: Timed, count: int) -> dict[str, Any]:
    """Milliseconds until every one of some prompts of 512 has its first token."""
    samples = [1e3 * all_at_once(service, count, PAST, 1) for _ in range(6)][1:]
    return {"prompts": count, "ms_median": float(np.median(samples)), "samples_ms": samples}


def all_at_once(service: Timed, count: int, length: int, new: int) -> float:
    """Seconds of some requests alike."""
    rng = np.random.default_rng()
    made = [rng.integers(3, service.spec.vocab_size, length).tolist() for _ in range(count)]
    start = time.perf_counter()
    running = [service.engine.submit(each, options_of(new)) for each in made]
    for each in running:
        each.result()
    return time.perf_counter() - start


def saturated(service: Timed, count: int, exit: int | None) -> dict[str, Any]:
    """All requests at once, every second of them at an exit."""
    arrivals = poisson(float("inf"), count, service.spec.vocab_size)
    if exit is not None:
        arrivals = [
            replace(each, exit=exit if index % 2 else None) for index, each in enumerate(arrivals)
        ]
    return served(service, arrivals, before=[] if exit is None else arrivals[: count // 4])


def arriving(service: Timed, options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Requests at random moments."""
    rate = SHARE * result["saturated"]["requests_per_second"]
    arrivals = poisson(rate, options.requests, service.spec.vocab_size, seed=8)
    options.arrivals.write_text(json.dumps(described(arrivals)), encoding="utf-8")
    return {"rate": rate, **served(service, arrivals)}


def served(
    service: Timed, arrivals: Sequence[Arrival], before: Sequence[Arrival] = ()
) -> dict[str, Any]:
    """Runs requests, after some that don't count, and says when their tokens came."""
    engine, times = service.engine, service.times
    for warm in [engine.submit(each.prompt, options_of(8, each.exit)) for each in before]:
        warm.result()

    def submit(each: Arrival) -> None:
        options = options_of(each.tokens, each.exit)
        now = time.perf_counter()
        request = engine.submit(each.prompt, options)
        times[request.id].submitted = now
        requests.append(request)

    requests: list[Request] = []
    passes = engine.stats().passes
    wait_and_submit(arrivals, submit)
    for each in requests:
        each.result()
    told = summary([times[each.id] for each in requests])
    return {**told, "passes": engine.stats().passes - passes}


def options_of(tokens: int, exit: int | None = None) -> GenerationOptions:
    """Greedy text of just so many tokens."""
    return GenerationOptions(exit=exit or "full", max_new_tokens=tokens, ignore_eos=True)


class _AllTimes(dict[int, Times]):
    """By request."""

    def __missing__(self, request: int) -> Times:
        self[request] = Times(0.0, [])
        return self[request]


@contextmanager
def timed(model: Model) -> Iterator[Timed]:
    """An engine that is warm; tokens are noted where they are handed out."""
    times, put = _AllTimes(), Request.put

    def note(self: Request, token: RequestToken) -> None:
        times[self.id].tokens.append(time.perf_counter())
        put(self, token)

    Request.put = note  # type: ignore[method-assign]
    try:
        with Engine(model, max_sequences=SEQUENCES, prefix_cache=False) as engine:
            start = time.perf_counter()
            engine.warm_up(exits=[model.spec.blocks // 2])
            took = time.perf_counter() - start
            yield Timed(engine, model.spec, times, took)
    finally:
        Request.put = put  # type: ignore[method-assign]


def shown(part: Any) -> Any:
    """A part without its samples."""
    if isinstance(part, list):
        return [shown(each) for each in part]
    if isinstance(part, dict):
        return {key: value for key, value in part.items() if "samples" not in key}
    return part


if __name__ == "__main__":
    main()
