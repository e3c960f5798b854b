"""Llama 2 and 3: RMSNorm, rotary positions, grouped heads, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import COMPLETE, MOST_BLOCKS, MOST_FEATURES, Config
from ojfa_export.models.families.family import Family, eos_token_ids
from ojfa_export.models.families.rotary import Rotary, read_rotary
from ojfa_export.models.families.tensors import HEAD, Source, linear, table, vector, vectors
from ojfa_export.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Reads a Llama config."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    blocks, vocabulary = (
        config.integer("num_hidden_layers", most=MOST_BLOCKS),
        config.integer("vocab_size"),
    )
    head_dim = read_head_dim(config)
    config.require("hidden_act", "silu", "swish")
    config.integer("pretraining_tp", 1)  # changes only how training split the products
    config.flag("attention_bias", False)
    config.flag("mlp_bias", False)
    return ModelSpec(
        family="llama",
        blocks=blocks,
        hidden_size=hidden,
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        attention_scales=(head_dim**-0.5,) * blocks,
        window=None,
        rotary_dim=rotary(config).dim,
        rotary_switch=None,
        activation="silu",
        gated=True,
        norm="rms",
        norm_epsilon=config.fraction("rms_norm_eps", 1e-6),
        max_positions=config.integer("max_position_embeddings", 2048),
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=eos_token_ids(config, vocabulary),
    )


def read_head_dim(config: Config) -> int:
    """Features of one head.

    Raises:
        CheckpointError: The heads don't share the hidden features evenly.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"{config.source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}",
            hint=COMPLETE,
        )
    return config.integer("head_dim", hidden // heads, MOST_FEATURES)


def rotary(config: Config) -> Rotary:
    """Reads a Llama config's rotary embedding."""
    head_dim = read_head_dim(config)
    result = read_rotary(config, head_dim, ("default", "linear", "dynamic", "llama3"))
    if result.dim != head_dim:
        raise CheckpointError(
            f"{config.source}: field 'partial_rotary_factor' is not supported for family 'llama'",
            hint="supported: heads that rotate whole",
        )
    return result


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    layer, hidden, inner = f"layers.{index}.", spec.hidden_size, spec.intermediate_size
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention, mlp = layer + "self_attn.", layer + "mlp."
    weights = {
        "attention.norm.weight": vector(layer + "input_layernorm.weight", hidden),
        "attention.qkv.weight": linear(
            hidden,
            (attention + "q_proj.weight", q),
            (attention + "k_proj.weight", kv),
            (attention + "v_proj.weight", kv),
        ),
        "attention.out.weight": linear(q, (attention + "o_proj.weight", hidden)),
        "mlp.norm.weight": vector(layer + "post_attention_layernorm.weight", hidden),
        "mlp.up.weight": linear(
            hidden, (mlp + "gate_proj.weight", inner), (mlp + "up_proj.weight", inner)
        ),
        "mlp.down.weight": linear(inner, (mlp + "down_proj.weight", hidden)),
    }
    if config.flag("attention_bias", False):
        weights["attention.qkv.bias"] = vectors(
            (attention + "q_proj.bias", q),
            (attention + "k_proj.bias", kv),
            (attention + "v_proj.bias", kv),
        )
        weights["attention.out.bias"] = vector(attention + "o_proj.bias", hidden)
    if config.flag("mlp_bias", False):
        weights["mlp.up.bias"] = vectors(
            (mlp + "gate_proj.bias", inner), (mlp + "up_proj.bias", inner)
        )
        weights["mlp.down.bias"] = vector(mlp + "down_proj.bias", hidden)
    return weights


def ends(config: Config, spec: ModelSpec) -> Mapping[str, Source]:
    """Weights before and after the blocks."""
    weights = {
        "token_embedding": table("embed_tokens.weight", spec.vocab_size, spec.hidden_size),
        "final_norm.weight": vector("norm.weight", spec.hidden_size),
    }
    if not spec.tied_head:
        weights["head"] = table(HEAD, spec.vocab_size, spec.hidden_size)
    return weights


LLAMA = Family("llama", spec, rotary, block, ends, prefixes=("model.", ""))
