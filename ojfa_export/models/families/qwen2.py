"""Qwen2 and Qwen2.5: Llama's blocks with a bias on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.families.windows import with_windows
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
MAX_POSITIONS, KV_HEADS, WINDOWED_FROM = 32_768, 32, 28


def spec(config: Config) -> ModelSpec:
    """Reads a Qwen2 config."""
    plain = llama.llama_spec(config, "qwen2", max_positions=MAX_POSITIONS, kv_heads=KV_HEADS)
    return qwen_windows(config, plain)


def qwen_windows(config: Config, spec: ModelSpec) -> ModelSpec:
    """A model with Qwen's windows: from some layer on, where they are used."""
    first = config.integer("max_window_layers", WINDOWED_FROM, least=0)
    return with_windows(config, spec, lambda index: index >= first)


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    return llama.llama_block(spec, index, qkv_bias=True)


QWEN2 = Family(
    "qwen2", "Qwen2 and Qwen2.5", spec, llama.rotary, block, llama.ends, prefixes=("model.", "")
)
