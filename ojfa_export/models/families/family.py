"""A model family: how to read its config, and where its tensors are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ojfa_export.models.families.config import Config
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """One model family, declared.

    Weight names are the same for every family (see `graphs.block`); a family says which
    checkpoint tensors they are.

    Attributes:
        model_type: `model_type` of the config.json files that it reads.
        models: Published models that it reads, for people.
        spec: Reads the config; raises CheckpointError for values that it can't honour.
        rotary: The rotary embedding of the config, or None for learned positions.
        block: Weights of block i, by name.
        ends: Weights before and after the blocks: `token_embedding`, `position_embedding`,
            `final_norm.weight`, `final_norm.bias`, `head`; `head` is left out where tied.
        prefixes: Prefixes that published checkpoints put before the names, most usual first.
    """

    model_type: str
    models: str
    spec: Callable[[Config], ModelSpec]
    rotary: Callable[[Config], Rotary | None]
    block: Callable[[Config, ModelSpec, int], Mapping[str, Source]]
    ends: Callable[[Config, ModelSpec], Mapping[str, Source]]
    prefixes: tuple[str, ...] = ("",)


def eos_token_ids(config: Config, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids of a config: none, one or several.

    Raises:
        CheckpointError: The field holds anything else than tokens of the vocabulary.
    """
    value = config.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(each) is int and 0 <= each < vocab_size for each in ids):
        raise config.wrong(
            "eos_token_id", f"a token id in 0..{vocab_size - 1} or a list of them", value
        )
    return tuple(ids)
