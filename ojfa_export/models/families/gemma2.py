"""Gemma 2: Llama's blocks with norms before and after, softcaps, and windows in every second block.

Source of the formulas: transformers' modeling_gemma2.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.families.tensors import Source, vector
from ojfa_export.models.families.windows import sliding_layers, with_window
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
HEAD_DIM, KV_HEADS, WINDOW = 256, 4, 4096
MAX_POSITIONS, ATTENTION_SOFTCAP, LOGIT_SOFTCAP = 8192, 50.0, 30.0


def spec(config: Config) -> ModelSpec:
    """Reads a Gemma 2 config."""
    plain = gemma_spec(config, "gemma2", MAX_POSITIONS, rotary(config))
    config.integer("sliding_window_size", WINDOW)  # read by nothing
    sliding = sliding_layers(config, plain.blocks, lambda index: index % 2 == 0)
    return with_window(plain, window(config), sliding).model_copy(
        update={
            "attention_softcap": config.softcap("attn_logit_softcapping", ATTENTION_SOFTCAP),
            "logit_softcap": config.softcap("final_logit_softcapping", LOGIT_SOFTCAP),
        }
    )


def gemma_spec(config: Config, family: str, max_positions: int, rotary: Rotary) -> ModelSpec:
    """What the architectures of Gemma 2 and Gemma 3 share.

    Args:
        config: Its config.
        family: Its name.
        max_positions: Where the config names none.
        rotary: Its rotary embedding.
    """
    config.flag("attention_bias", False)
    config.require("use_bidirectional_attention", False)
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.get("hidden_act")  # read by nothing
    plain = llama.llama_spec(
        config,
        family,
        max_positions=max_positions,
        kv_heads=KV_HEADS,
        attention_scale=config.integer("query_pre_attn_scalar", HEAD_DIM) ** -0.5,
        head_dim=HEAD_DIM,
        tied_head=True,
        activation="gelu_tanh",
        rotary_dim=rotary.dim,
    )
    return plain.model_copy(update={"norms": "both"})


def window(config: Config) -> int:
    """Keys that a query sees at most, in the layers that have a window."""
    return config.integer("sliding_window", WINDOW)


def rotary(config: Config) -> Rotary:
    """Reads a Gemma 2 config's rotary embedding."""
    return llama.rotary(config, HEAD_DIM)


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block, whose norms multiply by 1 + weight."""
    bias, layer = config.flag("attention_bias", False), f"layers.{index}."
    norms = {
        "attention.norm": "input_layernorm",
        "attention.after_norm": "post_attention_layernorm",
        "mlp.norm": "pre_feedforward_layernorm",
        "mlp.after_norm": "post_feedforward_layernorm",
    }
    return {
        **llama.llama_block(spec, index, qkv_bias=bias, out_bias=bias),
        **{
            f"{norm}.weight": vector(f"{layer}{name}.weight", spec.hidden_size).plus(1)
            for norm, name in norms.items()
        },
    }


def ends(config: Config, spec: ModelSpec) -> Mapping[str, Source]:
    """Weights before and after the blocks.

    The embedding is multiplied by the root of its length: in fp32, as transformers does in a model
    of fp32; one that it runs in bf16 has that factor rounded to bf16. Where the head is tied to the
    embedding, which isn't multiplied there, the final norm's weight takes it back.
    """
    weights, embedding = llama.ends(config, spec), spec.hidden_size**0.5
    norm = weights["final_norm.weight"].plus(1)
    return {
        **weights,
        "token_embedding": weights["token_embedding"].times(embedding),
        "final_norm.weight": norm.times(1 / embedding) if spec.tied_head else norm,
    }


GEMMA2 = Family("gemma2", "Gemma 2", spec, rotary, block, ends, prefixes=("model.", ""))
