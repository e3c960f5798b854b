"""Qwen3, dense: Llama's blocks, and a norm of each head of queries and of keys."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.qwen2 import KV_HEADS, MAX_POSITIONS, qwen_windows
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.families.tensors import Source, qk_norms
from ojfa_export.models.spec import ModelSpec

HEAD_DIM = 128  # where a config names none, as in transformers


def spec(config: Config) -> ModelSpec:
    """Reads a Qwen3 config."""
    plain = llama.llama_spec(
        config, "qwen3", max_positions=MAX_POSITIONS, kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    return qwen_windows(config, plain.model_copy(update={"qk_norm": "head"}))


def rotary(config: Config) -> Rotary:
    """Reads a Qwen3 config's rotary embedding."""
    return llama.rotary(config, HEAD_DIM)


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    bias = config.flag("attention_bias", False)
    weights = llama.llama_block(spec, index, qkv_bias=bias, out_bias=bias)
    return {**weights, **qk_norms(f"layers.{index}.self_attn.", spec)}


QWEN3 = Family("qwen3", "Qwen3, dense", spec, rotary, block, llama.ends, prefixes=("model.", ""))
