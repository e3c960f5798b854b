"""Llama 2 and 3: RMSNorm, rotary positions, grouped heads, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import COMPLETE, MOST_BLOCKS, MOST_FEATURES, Config
from ojfa_export.models.families.family import Family, eos_token_ids
from ojfa_export.models.families.rotary import THETA, Rotary, read_rotary
from ojfa_export.models.families.tensors import HEAD, Source, linear, table, vector, vectors
from ojfa_export.models.spec import Activation, ModelSpec


def spec(config: Config) -> ModelSpec:
    """Reads a Llama config."""
    config.integer("pretraining_tp", 1)  # changes only how training split the products
    config.flag("attention_bias", False)
    config.flag("mlp_bias", False)
    return llama_spec(config, "llama", max_positions=2048)


def llama_spec(
    config: Config,
    family: str,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    window: int | None = None,
    attention_scale: float | None = None,
    head_dim: int | None = None,
    theta: float = THETA,
    epsilon: float = 1e-6,
    tied_head: bool = False,
    activation: Activation | None = None,
    rotary_dim: int | None = None,
) -> ModelSpec:
    """The architecture of a family whose blocks are Llama's.

    Args:
        config: Its config.
        family: Its name.
        max_positions: Where the config names none.
        kv_heads: The same; None for as many as there are heads.
        window: Keys that a query sees at most; None for all.
        attention_scale: Factor on q.k; None for one over the root of a head's features.
        head_dim: Features of one head, where the config names none; None for the hidden ones'
            share.
        theta: Base of the rotation's frequencies, where the config names none.
        epsilon: Of the norms, the same.
        tied_head: The same.
        activation: The MLP's; None for SiLU, and a config that names no other.
        rotary_dim: Features of a head that rotate; None for those of Llama's rotary embedding.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    blocks, vocabulary = (
        config.integer("num_hidden_layers", most=MOST_BLOCKS),
        config.integer("vocab_size"),
    )
    features = read_head_dim(config, head_dim)
    if activation is None:
        config.require("hidden_act", "silu", "swish")
    if rotary_dim is None:
        rotary_dim = rotary(config, head_dim, theta).dim
    return ModelSpec(
        family=family,
        blocks=blocks,
        hidden_size=hidden,
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", kv_heads or heads),
        head_dim=features,
        intermediate_size=config.integer("intermediate_size"),
        attention_scales=(attention_scale or features**-0.5,) * blocks,
        window=window,
        rotary_dim=rotary_dim,
        rotary_switch=None,
        activation=activation or "silu",
        gated=True,
        norm="rms",
        norm_epsilon=config.fraction("rms_norm_eps", epsilon),
        max_positions=config.integer("max_position_embeddings", max_positions),
        tied_head=config.flag("tie_word_embeddings", tied_head),
        eos_token_ids=eos_token_ids(config, vocabulary),
    )


def read_head_dim(config: Config, default: int | None = None) -> int:
    """Features of one head.

    Args:
        config: The config.
        default: Where it names none; None for the hidden ones' share.

    Raises:
        CheckpointError: The heads don't share the hidden features evenly.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"{config.source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}",
            hint=COMPLETE,
        )
    return config.integer("head_dim", default or hidden // heads, MOST_FEATURES)


def rotary(config: Config, head_dim: int | None = None, theta: float = THETA) -> Rotary:
    """Reads the rotary embedding of a config like Llama's; see `llama_spec`."""
    features = read_head_dim(config, head_dim)
    kinds = ("default", "linear", "dynamic", "llama3")
    result = read_rotary(config, features, kinds, theta=theta)
    if result.dim != features:
        raise CheckpointError(
            f"{config.source}: field 'partial_rotary_factor' is not supported for this family",
            hint="supported: heads that rotate whole",
        )
    return result


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    attention, mlp = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    return llama_block(spec, index, qkv_bias=attention, out_bias=attention, mlp_bias=mlp)


def llama_block(
    spec: ModelSpec,
    index: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
) -> Mapping[str, Source]:
    """Weights of one block under Llama's names.

    Args:
        spec: The model.
        index: Which block.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether attention's output has one.
        mlp_bias: Whether the MLP's matrices have one.
    """
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
    if qkv_bias:
        weights["attention.qkv.bias"] = vectors(
            (attention + "q_proj.bias", q),
            (attention + "k_proj.bias", kv),
            (attention + "v_proj.bias", kv),
        )
    if out_bias:
        weights["attention.out.bias"] = vector(attention + "o_proj.bias", hidden)
    if mlp_bias:
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


LLAMA = Family(
    "llama",
    "Llama 2, 3, 3.1 and 3.2; SmolLM2; TinyLlama",
    spec,
    rotary,
    block,
    ends,
    prefixes=("model.", ""),
)
