"""Time of a step that is not spent in ONNX Runtime: what the chain itself costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session


@dataclass
class Stopwatch:
    """Seconds spent inside calls."""

    seconds: float = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, on the watch."""
        clock = time.perf_counter

        def run(*arguments: Any) -> Any:
            start = clock()
            result = call(*arguments)
            self.seconds += clock() - start
            return result

        return run


class _TimedSession:
    """An ONNX Runtime session whose runs are on a watch."""

    def __init__(self, session: ort.InferenceSession, watch: Stopwatch) -> None:
        self._session = session
        self.run = watch.timed(session.run)
        self.run_with_iobinding = watch.timed(session.run_with_iobinding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class TimedEngines(OnnxRuntimeEngines):
    """Engines that know how long ONNX Runtime has run; see `OnnxRuntimeEngines`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
    ) -> None:
        super().__init__(spec, weights, engines, rotary)
        self.watch = Stopwatch()
        self._timed: dict[str, _TimedSession] = {}

    def session(self, name: str) -> ort.InferenceSession:
        """The timed session of a graph, opened on first use."""
        if name not in self._timed:
            self._timed[name] = _TimedSession(super().session(name), self.watch)
        return self._timed[name]


@dataclass(frozen=True)
class Overhead:
    """Step overhead outside ONNX Runtime.

    Attributes:
        per_token_us: What a token costs whatever the exit, microseconds.
        per_block_us: What each block adds.
        samples_us: Every step's overhead by exit.
    """

    per_token_us: float
    per_block_us: float
    samples_us: dict[int, list[float]] = field(repr=False)


def measure_overhead(
    engines: TimedEngines, prompt_length: int, iterations: int, warmup: int = 5
) -> Overhead:
    """Measures the overhead of one-token steps at every exit.

    Per token and per block come from a least-squares line through the exits' medians; the full
    model is left out of the line where there are other exits, as its head is another graph.

    Args:
        engines: The model.
        prompt_length: Tokens in the cache.
        iterations: Timed steps for each exit.
        warmup: Steps before them.
    """
    session = Session(engines.spec, engines, 1, prompt_length + 1)
    session.advance([0] * prompt_length)
    exits = range(1, engines.spec.blocks + 1)
    samples: dict[int, list[float]] = {exit: [] for exit in exits}
    for turn in range(warmup + iterations):
        for exit in exits:
            seconds = _step_overhead(session, engines.watch, exit)
            session.rewind(prompt_length)
            if turn >= warmup:
                samples[exit].append(seconds * 1e6)
    fitted = list(exits)[:-1] if len(exits) > 2 else list(exits)
    medians = [float(np.median(samples[exit])) for exit in fitted]
    if len(fitted) == 1:
        return Overhead(medians[0], 0.0, samples)
    per_block, per_token = np.polyfit(fitted, medians, 1)
    return Overhead(float(per_token), float(per_block), samples)


def _step_overhead(session: Session, watch: Stopwatch, exit: int) -> float:
    inside, start = watch.seconds, time.perf_counter()
    session.advance([0], exit)
    return time.perf_counter() - start - (watch.seconds - inside)
