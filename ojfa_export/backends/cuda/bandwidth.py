"""The rate of the device's memory, which bounds decoding."""

from __future__ import annotations

import time

from ojfa_export.backends.cuda.device import Device, Memory

# Of the copy whose rate counts: many times what caches hold, as far as there is room.
COPY_BYTES = 1 << 30
COPIES = 8


def copy_bandwidth(device: Device) -> float:
    """Bytes per second that a copy on the device reads and writes, the best of a few."""
    device.make_current()
    free, _ = device.memory()
    size = min(COPY_BYTES, free // 4)
    source, target = (Memory(device, size, pooled=False) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        device.copy(source.pointer, target.pointer, size)
        device.synchronize()
        start = time.perf_counter()
        for _ in range(COPIES):
            device.copy(source.pointer, target.pointer, size)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * COPIES * size / best
