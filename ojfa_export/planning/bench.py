"""Decode and prefill latency of a bundle at its exits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ojfa_export import backends
from ojfa_export.backends.backend import Accelerated, Engines
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.decoding.exits import Exit, resolve_exit
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.bandwidth import bandwidth_of
from ojfa_export.planning.machine import describe_machine
from ojfa_export.planning.traffic import FLOAT_BYTES, decode_bytes, exit_head_bytes
from ojfa_export.runtime.model import load
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import Progress

# Tokens that an exit decodes before it is the next one's turn: few, so that noise hits all exits
# alike and the sequence stays about as long as the prompt.
BURST = 8


@dataclass(frozen=True)
class BenchSettings:
    """How latencies are measured.

    Attributes:
        prompt_length: Tokens of the prompt, and in the cache while decoding.
        warmup: Tokens (and prompts) per exit that are not counted, before the first that is.
        iterations: Decoded tokens that count, per exit.
        prefills: Prompts that count, per exit.
    """

    prompt_length: int
    warmup: int
    iterations: int
    prefills: int


@dataclass(frozen=True)
class ExitLatency:
    """Latency at one exit, batch 1, milliseconds.

    Attributes:
        blocks: Blocks run.
        bytes_touched: What a decode step must read.
        bandwidth_share: bytes_touched over the median time, over the bandwidth of the memory that
            they lie in (`planning.bandwidth`); above 1 where the weights stay in the caches.
    """

    blocks: int
    decode_ms_median: float
    decode_ms_p95: float
    tokens_per_second: float
    prefill_ms_median: float
    prefill_ms_p95: float
    prefill_tokens_per_second: float
    bytes_touched: int
    bandwidth_share: float


@dataclass(frozen=True)
class BenchResult:
    """What `ojfa-export bench` says.

    Attributes:
        machine: See `planning.machine`, with `bandwidth_bytes_per_second`.
        samples_ms: By exit: every counted `decode` and `prefill`.
    """

    machine: dict[str, Any]
    settings: BenchSettings
    exits: list[ExitLatency]
    samples_ms: dict[int, dict[str, list[float]]]

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return {
            "machine": self.machine,
            "settings": asdict(self.settings),
            "exits": [asdict(latency) for latency in self.exits],
            "samples_ms": {str(exit): samples for exit, samples in self.samples_ms.items()},
        }


def bench_bundle(
    bundle: Path,
    exits: Sequence[Exit] | None,
    prompt_length: int,
    warmup: int,
    iterations: int,
    progress: Progress,
    backend: str = backends.DEFAULT,
) -> BenchResult:
    """Measures a bundle's latencies.

    Args:
        bundle: Its directory.
        exits: Which exits; none for all.
        prompt_length: Tokens of the prompt, and in the cache while decoding.
        warmup: Tokens per exit that are not counted.
        iterations: Tokens per exit that are.
        progress: Told of every round.
        backend: Which of its engines to run.

    Raises:
        BundleError: The bundle can't be opened.
        UsageError: An exit outside the model, or numbers that leave nothing to measure.
    """
    settings = BenchSettings(
        prompt_length, warmup, iterations, prefills=max(3, iterations // BURST)
    )
    model, runs = load(bundle, backend=backend), backends.load(backend)
    spec = model.spec
    chosen: Sequence[Exit] = exits or [*model.exits, spec.blocks]
    depths = sorted({resolve_exit(exit, spec.blocks, model.exits) for exit in chosen})
    _check(settings, model.manifest.cache.max_length)
    with progress.task("memory bandwidth", 1, "pass") as task:
        bandwidth = bandwidth_of(runs)
        task.advance()
    samples = time_exits(spec, model.engines, depths, settings, progress)
    weights, element = model.manifest.weights, FLOAT_BYTES
    exit_head = exit_head_bytes(spec, model.manifest.shortcut, weights)
    if isinstance(runs, Accelerated):
        element = runs.weight_bytes(model.manifest.precision)
    latencies = [
        summarise(
            spec,
            e,
            samples[e],
            settings,
            exit_head,
            bandwidth,
            element,
            weights,
            exit_block=model.engines.exit_blocks is not None,
        )
        for e in depths
    ]
    machine = {**describe_machine(backend=runs), "bandwidth_bytes_per_second": bandwidth}
    return BenchResult(machine, settings, latencies, samples)


def _check(settings: BenchSettings, max_length: int) -> None:
    longest = max_length - BURST - 1
    if not 1 <= settings.prompt_length <= longest:
        raise UsageError(
            f"prompt length {settings.prompt_length} is outside 1..{longest}",
            hint=f"the cache holds {max_length} tokens, and {BURST + 1} more are decoded at a time",
        )
    if settings.iterations < 1 or settings.warmup < 0:
        raise UsageError("there is nothing to measure", hint="ask for one iteration or more")


def time_exits(
    spec: ModelSpec,
    engines: Engines,
    exits: Sequence[int],
    settings: BenchSettings,
    progress: Progress,
) -> dict[int, dict[str, list[float]]]:
    """Times decoding and prefill, the exits taking turns.

    Returns:
        By exit: milliseconds of every counted `decode` and `prefill`.
    """
    session = Session(spec, engines, 1, settings.prompt_length + BURST + 1)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, spec.vocab_size, settings.prompt_length).tolist()
    samples: dict[int, dict[str, list[float]]] = {e: {"decode": [], "prefill": []} for e in exits}
    warm_rounds, rounds = (-(-count // BURST) for count in (settings.warmup, settings.iterations))
    warm_prefills = min(settings.warmup, 1)
    with progress.task("prefill", warm_prefills + settings.prefills, "round") as task:
        for turn in range(warm_prefills + settings.prefills):
            for exit in exits:
                milliseconds = _prefill(session, prompt, exit)
                if turn >= warm_prefills:
                    samples[exit]["prefill"].append(milliseconds)
            task.advance()
    session.rewind(0)
    session.advance(prompt)
    with progress.task("decode", warm_rounds + rounds, "round") as task:
        for turn in range(warm_rounds + rounds):
            for exit in exits:
                burst = _decode(session, exit)
                if turn >= warm_rounds:
                    samples[exit]["decode"] += burst
            task.advance()
    for times in samples.values():
        del times["decode"][settings.iterations :]
    return samples


def _prefill(session: Session, prompt: list[int], exit: int) -> float:
    session.rewind(0)
    start = time.perf_counter()
    session.advance(prompt, exit)
    return (time.perf_counter() - start) * 1e3


def _decode(session: Session, exit: int) -> list[float]:
    """Decodes a burst and rewinds; its first token finds another exit's caches and is left out."""
    length, token, milliseconds = session.lengths[0], 0, []
    for _ in range(BURST + 1):
        start = time.perf_counter()
        [token] = session.choose([token], exit).tokens
        milliseconds.append((time.perf_counter() - start) * 1e3)
    session.rewind(length)
    return milliseconds[1:]


def summarise(
    spec: ModelSpec,
    exit: int,
    samples: Mapping[str, Sequence[float]],
    settings: BenchSettings,
    exit_head: int,
    bandwidth: float,
    element_bytes: int = FLOAT_BYTES,
    weights: WeightFormat | None = None,
    *,
    exit_block: bool = False,
) -> ExitLatency:
    """Medians and percentiles of an exit's samples (milliseconds)."""
    decode, decode_p95 = np.percentile(samples["decode"], [50, 95]).tolist()
    prefill, prefill_p95 = np.percentile(samples["prefill"], [50, 95]).tolist()
    length = settings.prompt_length + 1 + BURST // 2
    touched = decode_bytes(
        spec, exit, length, exit_head, element_bytes, weights, exit_block=exit_block
    )
    return ExitLatency(
        blocks=exit,
        decode_ms_median=decode,
        decode_ms_p95=decode_p95,
        tokens_per_second=1e3 / decode,
        prefill_ms_median=prefill,
        prefill_ms_p95=prefill_p95,
        prefill_tokens_per_second=1e3 * settings.prompt_length / prefill,
        bytes_touched=touched,
        bandwidth_share=touched / (decode / 1e3) / bandwidth,
    )
