"""OLMo 2: Llama's blocks with norms after attention and MLP, and norms of queries and of keys."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.tensors import Source, qk_norms, vector
from ojfa_export.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Reads an OLMo 2 config."""
    plain = llama.llama_spec(config, "olmo2", max_positions=2048, epsilon=1e-5)
    return plain.model_copy(update={"norms": "after", "qk_norm": "projection"})


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block."""
    bias, layer = config.flag("attention_bias", False), f"layers.{index}."
    after = ("attention", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")
    return {
        **llama.llama_block(spec, index, qkv_bias=bias, out_bias=bias),
        **{
            f"{part}.norm.weight": vector(f"{layer}{name}.weight", spec.hidden_size)
            for part, name in after
        },
        **qk_norms(layer + "self_attn.", spec),
    }


OLMO2 = Family("olmo2", "OLMo 2", spec, llama.rotary, block, llama.ends, prefixes=("model.", ""))
