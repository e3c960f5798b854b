"""What verifying asks of the GPU; nothing of it is on a token's way."""

from __future__ import annotations

import numpy as np

from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.tensorrt.blocks import Block
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.backends.tensorrt.workspace import Workspace
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.bfloat16 import widened


def trace_block(engines: TensorRtEngines, index: int, hidden: Float32) -> dict[str, Float32]:
    """Runs a block on one sequence as a prompt: see `backends.backend.Tracing`."""
    engines.device.make_current()
    tokens = len(hidden)
    whole = [Chunk(0, 0, tokens)]
    cache = KvCache(engines, 1, tokens)
    cache.pages.make_ready(whole)
    block = Block(engines, index, cache)
    workspace = Workspace(engines, tokens)
    workspace.place(whole)
    workspace.take(engines.arrays.asarray(hidden), index)
    block.run(workspace, False)
    normed = engines.spec.qk_norm != "none"
    found = {
        "attention.qkv normed" if normed else "attention.qkv": workspace.qkv,
        "attention.mixed": workspace.mixed,
        "hidden": workspace.hidden[1 - index % 2],
    }
    result = {name: widened(np.asarray(array)) for name, array in found.items()}
    block.unload()
    return result
