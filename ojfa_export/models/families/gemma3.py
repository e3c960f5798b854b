"""Gemma 3, its language models: Gemma 2's blocks, norms of queries and keys, two rotations.

Blocks with a window rotate by another base than those without. Source of the formulas:
transformers' modeling_gemma3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families import gemma2, llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.rotary import Rotary, read_rotary
from ojfa_export.models.families.tensors import Source, qk_norms
from ojfa_export.models.families.windows import FULL, SLIDING, sliding_layers, with_window
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers; every so many layers one has no window.
MAX_POSITIONS, PATTERN, BASE, LOCAL_BASE = 131_072, 6, 1e6, 1e4


def spec(config: Config) -> ModelSpec:
    """Reads a Gemma 3 config."""
    rotation = rotary(config)
    plain = gemma2.gemma_spec(config, "gemma3_text", MAX_POSITIONS, rotation)
    # transformers has the field, and doesn't cap by it.
    config.require("attn_logit_softcapping")
    # Newer configs have it under another name, beside the layers' types.
    pattern = config.integer("sliding_window_pattern", PATTERN)
    pattern = config.integer("_sliding_window_pattern", pattern)
    sliding = sliding_layers(config, plain.blocks, lambda index: (index + 1) % pattern != 0)
    return with_window(plain, gemma2.window(config), sliding).model_copy(
        update={
            "qk_norm": "head",
            "rotated_second": tuple(sliding),
            "logit_softcap": config.softcap("final_logit_softcapping", None),
        }
    )


def rotary(config: Config) -> Rotary:
    """Reads a Gemma 3 config's rotary embeddings: the second is that of blocks with a window."""
    given = config.get("rope_parameters")
    if given is None:
        scaling = config.get("rope_scaling", {})
        full = {"rope_theta": config.get("rope_theta", BASE), "rope_scaling": scaling}
        local = {"rope_theta": config.get("rope_local_base_freq", LOCAL_BASE)}
    else:
        config.require("rope_scaling")
        full, local = _of_layers(config, given, FULL), _of_layers(config, given, SLIDING)
    return replace(_rotation(config, full, BASE), second=_rotation(config, local, LOCAL_BASE))


def _of_layers(config: Config, given: Any, kind: str) -> dict[str, Any]:
    """The parameters of one type of layers, as a config with one rotary embedding has them."""
    if not isinstance(given, dict) or given.keys() - {FULL, SLIDING}:
        raise config.wrong("rope_parameters", f"an object with {FULL} and {SLIDING}", given)
    return {"rope_parameters": given.get(kind, {})}


def _rotation(config: Config, fields: Mapping[str, Any], theta: float) -> Rotary:
    length = config.integer("max_position_embeddings", MAX_POSITIONS)
    features = llama.read_head_dim(config, gemma2.HEAD_DIM)
    part = Config({**fields, "max_position_embeddings": length}, config.source)
    rotation = read_rotary(part, features, ("default", "linear"), theta=theta)
    if rotation.dim != features:
        raise CheckpointError(
            f"{config.source}: field 'partial_rotary_factor' is not supported for this family",
            hint="supported: heads that rotate whole",
        )
    return rotation


def block(config: Config, spec: ModelSpec, index: int) -> Mapping[str, Source]:
    """Weights of one block, whose norms multiply by 1 + weight."""
    norms = qk_norms(f"layers.{index}.self_attn.", spec)
    return {
        **gemma2.block(config, spec, index),
        **{name: norm.plus(1) for name, norm in norms.items()},
    }


GEMMA3 = Family(
    "gemma3_text",
    "Gemma 3 270M and 1B, and other ones' language models",
    spec,
    rotary,
    block,
    gemma2.ends,
    prefixes=("model.", ""),
)
