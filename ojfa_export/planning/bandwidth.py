"""Memory bandwidth where the weights are: the bound on decoding, which reads every one once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ojfa_export.backends.backend import Accelerated, Backend

# Several times the largest last-level cache of common machines.
BUFFER_BYTES = 512 << 20


def bandwidth_of(backend: Backend) -> float:
    """Bytes per second of the memory that a backend's weights lie in, measured.

    Of the machine's memory, reading alone; of a device's own, a copy, which reads and writes.
    """
    return backend.copy_bandwidth() if isinstance(backend, Accelerated) else read_bandwidth()


def read_bandwidth(buffer_bytes: int = BUFFER_BYTES, repeats: int = 9) -> float:
    """Measures how fast all threads together read memory, and only read.

    Each thread reduces its part of a buffer with a bitwise or: of NumPy's reductions the one that
    came closest to the memory's rate (35 GB/s where sums and dot products reached 30).

    Args:
        buffer_bytes: Size of the buffer; well beyond the caches.
        repeats: Passes over it, of which the median counts.

    Returns:
        Bytes per second.
    """
    from ojfa_export.backends.onnxruntime.session import share_thread_pool

    buffer = np.ones(buffer_bytes // 8, np.int64)
    threads = share_thread_pool()
    parts = np.array_split(buffer, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):  # the first pass starts the threads and is left out
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            seconds.append(time.perf_counter() - start)
    return buffer.nbytes / float(np.median(seconds[1:]))
