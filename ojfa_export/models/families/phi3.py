"""Phi-3 and Phi-4: Llama's block with fused projections, a sliding window and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import MOST_BLOCKS, Config
from ojfa_export.models.families.family import Family, eos_token_ids
from ojfa_export.models.families.rotary import Rotary, read_rotary
from ojfa_export.models.families.tensors import Source, linear, vector
from ojfa_export.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Reads a Phi-3 config."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    blocks = config.integer("num_hidden_layers", most=MOST_BLOCKS)
    vocabulary = config.integer("vocab_size", 32064)
    head_dim = llama.read_head_dim(config)
    rotary_embedding = rotary(config)
    config.require("hidden_act", "silu", "swish")
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, False)
    # Of Phi-4-mini, read by nothing in transformers; other values mean another model.
    for name in ("full_attn_mod", "interpolate_factor"):
        config.require(name, 1)
    return ModelSpec(
        family="phi3",
        blocks=blocks,
        hidden_size=hidden,
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        attention_scales=(head_dim**-0.5,) * blocks,
        window=None if config.get("sliding_window") is None else config.integer("sliding_window"),
        rotary_dim=rotary_embedding.dim,
        rotary_switch=rotary_embedding.switch_length,
        activation="silu",
        gated=True,
        norm="rms",
        norm_epsilon=config.fraction("rms_norm_eps", 1e-5),
        max_positions=config.integer("max_position_embeddings", 4096),
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=eos_token_ids(config, vocabulary),
    )


def rotary(config: Config) -> Rotary:
    """Reads a Phi-3 config's rotary embedding."""
    return read_rotary(config, llama.read_head_dim(config), ("default", "longrope"))


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    layer, hidden, inner = f"layers.{index}.", spec.hidden_size, spec.intermediate_size
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention, mlp = layer + "self_attn.", layer + "mlp."
    return {
        "attention.norm.weight": vector(layer + "input_layernorm.weight", hidden),
        "attention.qkv.weight": linear(hidden, (attention + "qkv_proj.weight", q + 2 * kv)),
        "attention.out.weight": linear(q, (attention + "o_proj.weight", hidden)),
        "mlp.norm.weight": vector(layer + "post_attention_layernorm.weight", hidden),
        "mlp.up.weight": linear(hidden, (mlp + "gate_up_proj.weight", 2 * inner)),
        "mlp.down.weight": linear(inner, (mlp + "down_proj.weight", hidden)),
    }


PHI3 = Family(
    "phi3",
    "Phi-3 and Phi-3.5 mini and medium; Phi-4 and Phi-4-mini",
    spec,
    rotary,
    block,
    llama.ends,
    prefixes=("model.", ""),
)
