"""Qwen2 and Qwen2.5: Llama's blocks with a bias on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
MAX_POSITIONS, KV_HEADS = 32_768, 32
FULL = "full_attention"


def spec(config: Config) -> ModelSpec:
    """Reads a Qwen2 config.

    Raises:
        CheckpointError: Some of its layers have a sliding window.
    """
    config.require("use_sliding_window", False)
    # Read by nothing without the window; published configs have them all the same.
    for name in ("sliding_window", "max_window_layers"):
        if config.get(name) is not None:
            config.integer(name)
    layers = config.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) != {FULL}):
        raise CheckpointError(
            f"{config.source}: field 'layer_types' is {layers!r:.60}, which is not supported",
            hint=f"supported: {FULL} in every layer",
        )
    return llama.llama_spec(config, "qwen2", max_positions=MAX_POSITIONS, kv_heads=KV_HEADS)


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    return llama.llama_block(spec, index, qkv_bias=True)


QWEN2 = Family(
    "qwen2", "Qwen2 and Qwen2.5", spec, llama.rotary, block, llama.ends, prefixes=("model.", "")
)
