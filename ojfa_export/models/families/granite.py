"""Granite 3: Llama's blocks, and four factors that its weights and attention scales take in.

Source of the formulas: transformers' modeling_granite.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.spec import ModelSpec

EMBEDDING, RESIDUAL, LOGITS = "embedding_multiplier", "residual_multiplier", "logits_scaling"
# What is added to the hidden states.
ADDED = ("attention.out.", "mlp.down.")


def spec(config: Config) -> ModelSpec:
    """Reads a Granite config."""
    for name in (EMBEDDING, RESIDUAL, LOGITS):
        config.factor(name)
    for name in ("attention_bias", "mlp_bias"):
        config.flag(name, False)
    scale = config.factor("attention_multiplier")
    return llama.llama_spec(config, "granite", max_positions=2048, attention_scale=scale)


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block: what it adds to the hidden states has the residual multiplier."""
    residual = config.factor(RESIDUAL)
    return {
        name: source.times(residual) if name.startswith(ADDED) else source
        for name, source in llama.block(config, spec, index).items()
    }


def ends(config: Config, spec: ModelSpec) -> Mapping[str, Source]:
    """Weights before and after the blocks.

    The final norm's weight divides the logits, so that the head is the embedding where they are
    tied: there it undoes what the embedding is multiplied with.
    """
    weights, embedding = llama.ends(config, spec), config.factor(EMBEDDING)
    divided = config.factor(LOGITS) * (embedding if spec.tied_head else 1)
    return {
        **weights,
        "token_embedding": weights["token_embedding"].times(embedding),
        "final_norm.weight": weights["final_norm.weight"].times(1 / divided),
    }


GRANITE = Family(
    "granite",
    "Granite 3.0 to 3.3, dense",
    spec,
    llama.rotary,
    block,
    ends,
    prefixes=("model.", ""),
)
