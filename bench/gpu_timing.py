"""What the benchmarks on a GPU share: steps of a session, device time, and the machine."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.cuda.device import Device, Memory, check
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.session import Session

COPY_BYTES = 4 << 30
WARMUP = 4


def steps(session: Session, exit: int, past: int, tokens: int) -> list[float]:
    """Milliseconds of each step at an exit, logits on the host included."""
    samples = []
    pending = [[1]] * session.batch_size
    for step in range(WARMUP + tokens):
        start = time.perf_counter()
        session.advance(pending, exit)
        if step >= WARMUP:
            samples.append((time.perf_counter() - start) * 1e3)
    for row in range(session.batch_size):
        session.rewind(past, row)
    return samples


def prefill(engines: Engines, spec: ModelSpec, tokens: int) -> dict[str, Any]:
    """Milliseconds of a prompt, to the logits of its last token."""
    session = Session(spec, engines, 1, tokens)
    ids = np.random.default_rng(2).integers(0, spec.vocab_size, tokens).tolist()
    samples = []
    for _ in range(6):
        start = time.perf_counter()
        session.advance(ids)
        samples.append((time.perf_counter() - start) * 1e3)
        session.rewind(0)
    print(f"prefill of {tokens}: {np.median(samples[1:]):.1f} ms", flush=True)
    return {"tokens": tokens, "ms_median": float(np.median(samples[1:])), "samples_ms": samples}


def graph_time(device: Device, work: Callable[[], None]) -> float:
    """Microseconds of what `work` puts on the stream, as a CUDA graph."""
    work()
    device.synchronize()
    graph = device.capture(work)
    graph.launch()
    return event_time(device, graph.launch)


def event_time(device: Device, work: Callable[[], None], repeats: int = 11) -> float:
    """Median microseconds on the device of what `work` puts on the stream."""
    first, last = (check(driver.cuEventCreate(0)) for _ in range(2))
    samples = []
    for _ in range(repeats):
        check(driver.cuEventRecord(first, device.stream))
        work()
        check(driver.cuEventRecord(last, device.stream))
        device.synchronize()
        samples.append(float(check(driver.cuEventElapsedTime(first, last))) * 1e3)
    return float(np.median(samples))


def copy_bandwidth(device: Device) -> float:
    """Bytes per second read and written by a copy on the device."""
    source, target = (Memory(device, COPY_BYTES // 2, pooled=False) for _ in range(2))

    def copy() -> None:
        device.copy(source.pointer, target.pointer, COPY_BYTES // 2)

    copy()
    return COPY_BYTES / (event_time(device, copy) / 1e6)


def commit() -> str:
    """The commit that is measured; "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def nvidia_smi() -> str:
    """Name, driver, clocks and power as nvidia-smi tells."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
