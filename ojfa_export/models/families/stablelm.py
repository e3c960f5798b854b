"""StableLM: Llama's blocks with LayerNorm, and heads that rotate in part."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import MOST_BLOCKS, Config
from ojfa_export.models.families.family import Family, eos_token_ids
from ojfa_export.models.families.rotary import Rotary, read_rotary
from ojfa_export.models.families.tensors import Source, vector
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
MAX_POSITIONS, KV_HEADS, ROTATED = 4096, 32, 0.25


def spec(config: Config) -> ModelSpec:
    """Reads a StableLM config.

    Raises:
        CheckpointError: Attention and MLP are side by side, or queries and keys have norms.
    """
    for name in ("use_parallel_residual", "qk_layernorm"):
        config.require(name, False)
    config.require("hidden_act", "silu", "swish")
    config.flag("use_qkv_bias", False)
    heads, head_dim = config.integer("num_attention_heads"), read_head_dim(config)
    blocks = config.integer("num_hidden_layers", most=MOST_BLOCKS)
    vocabulary = config.integer("vocab_size")
    return ModelSpec(
        family="stablelm",
        blocks=blocks,
        hidden_size=config.integer("hidden_size"),
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", KV_HEADS),
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        attention_scales=(head_dim**-0.5,) * blocks,
        window=None,
        rotary_dim=rotary(config).dim,
        rotary_switch=None,
        activation="silu",
        gated=True,
        norm="layer",
        norm_epsilon=config.fraction("layer_norm_eps", 1e-5),
        max_positions=config.integer("max_position_embeddings", MAX_POSITIONS),
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=eos_token_ids(config, vocabulary),
    )


def read_head_dim(config: Config) -> int:
    """Features of one head, which share the hidden ones evenly.

    Raises:
        CheckpointError: They don't.
    """
    heads = config.integer("num_attention_heads")
    config.require("head_dim", config.integer("hidden_size") // heads)
    return llama.read_head_dim(config)


def rotary(config: Config) -> Rotary:
    """Reads a StableLM config's rotary embedding."""
    kinds = ("default", "linear", "dynamic", "llama3")
    return read_rotary(config, read_head_dim(config), kinds, partial=ROTATED)


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    layer, bias = f"layers.{index}.", config.flag("use_qkv_bias", False)
    return {
        **llama.llama_block(spec, index, qkv_bias=bias),
        "attention.norm.bias": vector(layer + "input_layernorm.bias", spec.hidden_size),
        "mlp.norm.bias": vector(layer + "post_attention_layernorm.bias", spec.hidden_size),
    }


def ends(config: Config, spec: ModelSpec) -> Mapping[str, Source]:
    """Weights before and after the blocks."""
    bias = vector("norm.bias", spec.hidden_size)
    return {**llama.ends(config, spec), "final_norm.bias": bias}


STABLELM = Family(
    "stablelm",
    "StableLM 2 1.6B and Zephyr 1.6B",
    spec,
    rotary,
    block,
    ends,
    prefixes=("model.", ""),
)
