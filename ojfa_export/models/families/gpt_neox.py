"""GPT-NeoX and Pythia: LayerNorm, attention and MLP side by side, heads that rotate in part."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families import llama
from ojfa_export.models.families.config import MOST_BLOCKS, Config
from ojfa_export.models.families.family import Family, eos_token_ids
from ojfa_export.models.families.gpt2 import ACTIVATIONS
from ojfa_export.models.families.rotary import THETA, Rotary, read_rotary
from ojfa_export.models.families.tensors import HEAD, Source, linear, table, vector
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
MAX_POSITIONS, ROTATED = 2048, 0.25


def spec(config: Config) -> ModelSpec:
    """Reads a GPT-NeoX config."""
    heads, head_dim = config.integer("num_attention_heads"), llama.read_head_dim(config)
    blocks = config.integer("num_hidden_layers", most=MOST_BLOCKS)
    vocabulary = config.integer("vocab_size")
    config.require("head_dim", config.integer("hidden_size") // heads)
    config.flag("is_decoder", False)  # read by nothing
    config.flag("attention_bias", True)
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{config.source}: activation {activation!r:.60} is not supported",
            hint=f"supported: {', '.join(ACTIVATIONS)}",
        )
    return ModelSpec(
        family="gpt_neox",
        blocks=blocks,
        hidden_size=config.integer("hidden_size"),
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        attention_scales=(head_dim**-0.5,) * blocks,
        window=None,
        rotary_dim=rotary(config).dim,
        rotary_switch=None,
        activation=ACTIVATIONS[activation],
        gated=False,
        norm="layer",
        norm_epsilon=config.fraction("layer_norm_eps", 1e-5),
        max_positions=config.integer("max_position_embeddings", MAX_POSITIONS),
        tied_head=config.flag("tie_word_embeddings", False),
        eos_token_ids=eos_token_ids(config, vocabulary),
        parallel=config.flag("use_parallel_residual", True),
    )


def rotary(config: Config) -> Rotary:
    """Reads a GPT-NeoX config's rotary embedding, whose older names are its own."""
    return read_rotary(
        config,
        llama.read_head_dim(config),
        ("default", "linear", "dynamic", "llama3"),
        partial=config.get("rotary_pct", ROTATED),
        theta=config.get("rotary_emb_base", THETA),
    )


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block, whose queries, keys and values are stored head by head."""
    layer, hidden, inner = f"layers.{index}.", spec.hidden_size, spec.intermediate_size
    qkv, out = layer + "attention.query_key_value", layer + "attention.dense"
    up, down = layer + "mlp.dense_h_to_4h", layer + "mlp.dense_4h_to_h"
    weights = {
        "attention.qkv.weight": linear(hidden, (qkv + ".weight", 3 * hidden)).by_head(spec.heads),
        "attention.out.weight": linear(hidden, (out + ".weight", hidden)),
        "mlp.up.weight": linear(hidden, (up + ".weight", inner)),
        "mlp.up.bias": vector(up + ".bias", inner),
        "mlp.down.weight": linear(inner, (down + ".weight", hidden)),
        "mlp.down.bias": vector(down + ".bias", hidden),
    }
    for kind in ("weight", "bias"):
        weights[f"attention.norm.{kind}"] = vector(f"{layer}input_layernorm.{kind}", hidden)
        weights[f"mlp.norm.{kind}"] = vector(f"{layer}post_attention_layernorm.{kind}", hidden)
    if config.flag("attention_bias", True):
        weights["attention.qkv.bias"] = vector(qkv + ".bias", 3 * hidden).by_head(spec.heads)
        weights["attention.out.bias"] = vector(out + ".bias", hidden)
    return weights


def ends(config: Config, spec: ModelSpec) -> Mapping[str, Source]:
    """Weights before and after the blocks."""
    weights = {
        "token_embedding": table("embed_in.weight", spec.vocab_size, spec.hidden_size),
        "final_norm.weight": vector("final_layer_norm.weight", spec.hidden_size),
        "final_norm.bias": vector("final_layer_norm.bias", spec.hidden_size),
    }
    if not spec.tied_head:
        weights["head"] = table(HEAD, spec.vocab_size, spec.hidden_size)
    return weights


GPT_NEOX = Family(
    "gpt_neox",
    "GPT-NeoX; Pythia, all sizes",
    spec,
    rotary,
    block,
    ends,
    prefixes=("gpt_neox.", ""),
)
