"""Launching the norms of queries and keys (engines/kernels/qk_norm.cu)."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

from ojfa_export.models.spec import ModelSpec

if TYPE_CHECKING:
    from ojfa_export.backends.cuda.kernels import Kernels

# As in the kernel: threads of a warp, warps of a thread block.
LANES, WARPS = 32, 8


def norm_queries_and_keys(
    kernels: Kernels,
    spec: ModelSpec,
    tokens: int,
    qkv: int,
    query_weight: int,
    key_weight: int,
) -> None:
    """Norms each head of queries and of keys, in place.

    Args:
        kernels: Compiled for the model.
        spec: The model.
        tokens: How many.
        qkv: Address of [tokens, (heads + 2 kv_heads) head_dim] fp32.
        query_weight: Address of the weight [head_dim] fp32 of the norm of queries.
        key_weight: The same of keys.
    """
    addresses = [(each, ctypes.c_void_p) for each in (qkv, query_weight, key_weight)]
    kernels.launch(
        "norm_queries_and_keys",
        (tokens, math.ceil((spec.heads + spec.kv_heads) / WARPS), 1),
        (WARPS * LANES, 1, 1),
        (*addresses, (spec.norm_epsilon, ctypes.c_float)),
        overlapping=True,
    )
