"""GPT-2, all sizes: LayerNorm, learned positions, Conv1D weights, GELU."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import COMPLETE, MOST_BLOCKS, Config
from ojfa_export.models.families.family import Family, eos_token_ids
from ojfa_export.models.families.tensors import HEAD, Source, conv1d, table, vector
from ojfa_export.models.spec import Activation, ModelSpec

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def spec(config: Config) -> ModelSpec:
    """Reads a GPT-2 config."""
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    if hidden % heads:
        raise CheckpointError(
            f"{config.source}: n_embd {hidden} is no multiple of n_head {heads}", hint=COMPLETE
        )
    blocks, vocabulary = config.integer("n_layer", most=MOST_BLOCKS), config.integer("vocab_size")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{config.source}: activation {activation!r:.60} is not supported",
            hint=f"supported: {', '.join(ACTIVATIONS)}",
        )
    config.require("add_cross_attention", False)
    config.flag("reorder_and_upcast_attn", False)  # an order of rounding, not a result
    scale = (hidden // heads) ** -0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)
    return ModelSpec(
        family="gpt2",
        blocks=blocks,
        hidden_size=hidden,
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.integer("n_inner", 4 * hidden),
        attention_scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(blocks)),
        window=None,
        rotary_dim=0,
        rotary_switch=None,
        activation=ACTIVATIONS[activation],
        gated=False,
        norm="layer",
        norm_epsilon=config.fraction("layer_norm_epsilon", 1e-5),
        max_positions=config.integer("n_positions", 1024),
        tied_head=config.flag("tie_word_embeddings", True),
        eos_token_ids=eos_token_ids(config, vocabulary),
    )


def rotary(config: Config) -> None:
    """GPT-2 has none: its positions are learned."""


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    layer, hidden, inner = f"h.{index}.", spec.hidden_size, spec.intermediate_size
    return {
        "attention.norm.weight": vector(layer + "ln_1.weight", hidden),
        "attention.norm.bias": vector(layer + "ln_1.bias", hidden),
        "attention.qkv.weight": conv1d(hidden, layer + "attn.c_attn.weight", 3 * hidden),
        "attention.qkv.bias": vector(layer + "attn.c_attn.bias", 3 * hidden),
        "attention.out.weight": conv1d(hidden, layer + "attn.c_proj.weight", hidden),
        "attention.out.bias": vector(layer + "attn.c_proj.bias", hidden),
        "mlp.norm.weight": vector(layer + "ln_2.weight", hidden),
        "mlp.norm.bias": vector(layer + "ln_2.bias", hidden),
        "mlp.up.weight": conv1d(hidden, layer + "mlp.c_fc.weight", inner),
        "mlp.up.bias": vector(layer + "mlp.c_fc.bias", inner),
        "mlp.down.weight": conv1d(inner, layer + "mlp.c_proj.weight", hidden),
        "mlp.down.bias": vector(layer + "mlp.c_proj.bias", hidden),
    }


def ends(config: Config, spec: ModelSpec) -> Mapping[str, Source]:
    """Weights before and after the blocks."""
    hidden = spec.hidden_size
    weights = {
        "token_embedding": table("wte.weight", spec.vocab_size, hidden),
        "position_embedding": table("wpe.weight", spec.max_positions, hidden),
        "final_norm.weight": vector("ln_f.weight", hidden),
        "final_norm.bias": vector("ln_f.bias", hidden),
    }
    if not spec.tied_head:
        weights["head"] = table(HEAD, spec.vocab_size, hidden)
    return weights


GPT2 = Family(
    "gpt2",
    "GPT-2, all sizes; DistilGPT-2",
    spec,
    rotary,
    block,
    ends,
    prefixes=("transformer.", ""),
)
