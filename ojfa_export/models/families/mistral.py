"""Mistral: Llama's blocks, and in some models a sliding window."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
MAX_POSITIONS, KV_HEADS = 4096 * 32, 8


def spec(config: Config) -> ModelSpec:
    """Reads a Mistral config."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    return llama.llama_spec(
        config, "mistral", max_positions=MAX_POSITIONS, kv_heads=KV_HEADS, window=window
    )


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block: none has a bias."""
    return llama.llama_block(spec, index)


MISTRAL = Family(
    "mistral",
    "Mistral 7B, with and without a sliding window",
    spec,
    llama.rotary,
    block,
    llama.ends,
    prefixes=("model.", ""),
)
