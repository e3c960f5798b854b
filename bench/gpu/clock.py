"""Time on the device, between two events."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cuda.bindings import driver

from ojfa_export.backends.cuda.device import Device, Memory, check
from ojfa_export.backends.cuda.recorder import Recording

COPY_BYTES = 4 << 30
REPLAYS = 8


def graph_time(device: Device, work: Callable[[], None]) -> float:
    """Microseconds of what `work` puts on the stream, as a CUDA graph."""
    work()
    device.synchronize()
    graph = device.capture(work)
    graph.launch()
    return event_time(device, graph.launch)


def replay_time(device: Device, graph: Recording) -> float:
    """Microseconds of a recording that is replayed without pause: what a step takes by itself."""

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.launch()

    replay()
    return event_time(device, replay) / REPLAYS


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
