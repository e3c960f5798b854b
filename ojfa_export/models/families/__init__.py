"""Model families: adding one is adding a file and a line here."""

from __future__ import annotations

from difflib import get_close_matches

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families.config import COMPLETE, QUANTISATION, Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.gemma2 import GEMMA2
from ojfa_export.models.families.gemma3 import GEMMA3
from ojfa_export.models.families.gpt2 import GPT2
from ojfa_export.models.families.gpt_neox import GPT_NEOX
from ojfa_export.models.families.granite import GRANITE
from ojfa_export.models.families.llama import LLAMA
from ojfa_export.models.families.mistral import MISTRAL
from ojfa_export.models.families.olmo2 import OLMO2
from ojfa_export.models.families.phi3 import PHI3
from ojfa_export.models.families.qwen2 import QWEN2
from ojfa_export.models.families.qwen3 import QWEN3
from ojfa_export.models.families.smollm3 import SMOLLM3
from ojfa_export.models.families.stablelm import STABLELM
from ojfa_export.models.spec import ModelSpec

FAMILIES = {
    family.model_type: family
    for family in (
        GEMMA2,
        GEMMA3,
        GPT2,
        GPT_NEOX,
        GRANITE,
        LLAMA,
        MISTRAL,
        OLMO2,
        PHI3,
        QWEN2,
        QWEN3,
        SMOLLM3,
        STABLELM,
    )
}
# Gemma 3 from 4B on, as published: a language model and what sees for it.
MULTIMODAL = "gemma3"


def read_spec(config: Config) -> tuple[Family, ModelSpec]:
    """Finds a config's family and reads its architecture.

    Raises:
        CheckpointError: Unknown family, or fields that are not understood.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type == MULTIMODAL:
            raise CheckpointError(
                f"{config.source}: model family '{MULTIMODAL}' reads images too, which is not "
                "supported",
                hint=f"save its language model alone, of family '{GEMMA3.model_type}', as "
                "docs/checkpoints.md shows",
            )
        raise CheckpointError(
            f"{config.source}: model family '{model_type!s:.60}' is not supported",
            hint=f"supported: {', '.join(sorted(FAMILIES))}{_nearest(model_type)}",
        )
    stored = config.get(QUANTISATION)  # `models.checkpoint.quantised` reads it
    if stored is not None and not (isinstance(stored, dict) and "quant_method" in stored):
        raise config.wrong(QUANTISATION, "an object that names its quant_method", stored)
    # Nothing in transformers reads these, whose other values mean another model.
    for name in ("lm_head_bias", "rope_interleaved"):
        config.require(name, False)
    family = FAMILIES[model_type]
    spec = family.spec(config)
    if spec.heads % spec.kv_heads:
        raise CheckpointError(
            f"{config.source}: {spec.heads} heads can't share {spec.kv_heads} key-value heads",
            hint=COMPLETE,
        )
    family.rotary(config)
    family.block(config, spec, 0)
    config.refuse_unread(model_type)
    return family, spec


def _nearest(model_type: object) -> str:
    """The known family whose name is most like a name, in words; nothing where none is."""
    if not isinstance(model_type, str):
        return ""
    found = get_close_matches(model_type, FAMILIES, n=1, cutoff=0.7)
    return f"; the nearest is '{found[0]}'" if found else ""
