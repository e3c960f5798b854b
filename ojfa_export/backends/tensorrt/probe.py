"""What measuring and verifying ask of the GPU; nothing of it is on a token's way."""

from __future__ import annotations

import time

import numpy as np

from ojfa_export.backends.backend import Float32
from ojfa_export.backends.tensorrt.blocks import Block, Workspace
from ojfa_export.backends.tensorrt.device import Device, Memory
from ojfa_export.backends.tensorrt.engines import TensorRtEngines

# Of the copy whose rate counts: many times what caches hold, as far as there is room.
COPY_BYTES = 1 << 30
COPIES = 8


def trace_block(engines: TensorRtEngines, index: int, hidden: Float32) -> dict[str, Float32]:
    """Runs a block on one sequence as a prompt: see `backends.backend.Tracing`."""
    engines.device.make_current()
    spec, tokens = engines.spec, len(hidden)
    block = Block(engines, index, (1, spec.kv_heads, tokens, spec.head_dim))
    workspace = Workspace(engines, tokens)
    workspace.place(range(tokens), [0] * tokens)
    workspace.take(engines.arrays.asarray(hidden), index)
    block.run(workspace, False, together=False)
    found = {
        "attention.qkv": workspace.qkv,
        "attention.mixed": workspace.mixed,
        "hidden": workspace.hidden[1 - index % 2],
    }
    result = {name: np.asarray(array).astype(np.float32) for name, array in found.items()}
    block.unload()
    return result


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
