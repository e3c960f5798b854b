"""SmolLM3: Llama's blocks, some of which rotate nothing."""

from __future__ import annotations

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families import llama
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import Family
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.families.windows import with_windows
from ojfa_export.models.spec import ModelSpec

# Where a config names none, as in transformers.
MAX_POSITIONS, KV_HEADS, INTERVAL, BASE = 32_768, 4, 4, 2e6


def spec(config: Config) -> ModelSpec:
    """Reads a SmolLM3 config."""
    config.integer("pretraining_tp", 1)  # changes only how training split the products
    # Read by nothing; published configs have it from Qwen's.
    config.integer("max_window_layers", 1, least=0)
    for name in ("attention_bias", "mlp_bias"):
        config.flag(name, False)
    plain = llama.llama_spec(
        config,
        "smollm3",
        max_positions=MAX_POSITIONS,
        kv_heads=KV_HEADS,
        theta=BASE,
        tied_head=True,
    )
    rotated = _rotated(config, plain.blocks)
    some = () if all(rotated) else rotated
    part = plain.model_copy(update={"rotated": some})
    return with_windows(config, part, lambda index: not rotated[index])


def _rotated(config: Config, blocks: int) -> tuple[bool, ...]:
    """For each layer whether it rotates."""
    interval = config.integer("no_rope_layer_interval", INTERVAL)
    listed = config.get("no_rope_layers")
    if listed is None:
        return tuple((index + 1) % interval != 0 for index in range(blocks))
    if not isinstance(listed, list) or len(listed) < blocks:
        raise config.wrong("no_rope_layers", f"a list of {blocks} numbers or more", listed)
    if not all(type(each) is int and each in (0, 1) for each in listed):
        raise CheckpointError(
            f"{config.source}: field 'no_rope_layers' is {listed!r:.60}, which is not supported",
            hint="supported: 1 for each layer that rotates, 0 for others",
        )
    return tuple(each == 1 for each in listed[:blocks])


def rotary(config: Config) -> Rotary:
    """Reads a SmolLM3 config's rotary embedding."""
    return llama.rotary(config, theta=BASE)


SMOLLM3 = Family(
    "smollm3", "SmolLM3 3B", spec, rotary, llama.block, llama.ends, prefixes=("model.", "")
)
