"""What a checkpoint says of how its text is generated: generation_config.json, or config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ojfa_export.decoding.generation_defaults import GenerationDefaults
from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.fields import read_fields
from ojfa_export.models.families.config import GENERATION_FIELDS, QUANTISATION, Config
from ojfa_export.models.families.family import eos_token_ids

GENERATION_CONFIG = "generation_config.json"
# What doesn't change the next token: lengths and whether to sample, which requests say; names of
# tokens; settings of ways of generating that are off; output, caches and compilers.
_OFF = (
    "_from_model_config assistant_confidence_threshold assistant_early_exit "
    "assistant_lookbehind bos_token_id cache_config cache_implementation compile_config "
    "decoder_start_token_id disable_compile diversity_penalty do_sample early_stopping "
    "is_assistant length_penalty low_memory max_length max_matching_ngram_size max_new_tokens "
    "num_assistant_tokens num_assistant_tokens_schedule output_attentions "
    "output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size "
    "remove_invalid_values renormalize_logits return_dict_in_generate target_lookbehind "
    "transformers_version use_cache"
)
_HARMLESS = frozenset(_OFF.split())
# What would change it, but for these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "typical_p": (1,),
}
_HINT = "correct it, or go on without it: --ignore-config-field {}"
# Values by which transformers means nothing, of what is followed.
_NOTHING: Mapping[str, Any] = {"temperature": 0, "top_k": 0}


def read_generation(
    directory: Path, config: Config, vocab_size: int
) -> tuple[tuple[int, ...], GenerationDefaults]:
    """Reads end-of-text ids and the defaults of generation, as transformers finds them.

    Args:
        directory: The checkpoint's. Where it has no generation_config.json, its config.json counts,
            in which old checkpoints say the same.
        config: Its config.json.
        vocab_size: Of the model.

    Raises:
        CheckpointError: A value that can't be right, or a field that is not followed and not known
            to be harmless.
    """
    path = directory / GENERATION_CONFIG
    if path.exists():
        fields = Config(read_fields(path), str(path), config.ignored)
        known = {*config.fields, *fields.fields}
    else:
        said = {name: value for name, value in config.fields.items() if name in GENERATION_FIELDS}
        fields, known = Config(said, config.source, config.ignored), {*config.fields}
    stored = config.fields.get(QUANTISATION)
    if isinstance(stored, dict):
        known |= {f"{QUANTISATION}.{name}" for name in stored}
    for name in sorted(config.ignored - known):
        raise CheckpointError(
            f"{config.source} has no field {name!r:.60} that could be ignored"
            + (f", nor has {GENERATION_CONFIG}" if path.exists() else ""),
            hint=f"leave out --ignore-config-field {name:.60}",
        )
    ids = eos_token_ids(fields, vocab_size) or eos_token_ids(config, vocab_size)
    given = {
        name: value
        for name, value in fields.fields.items()
        if value is not None and name not in {*config.ignored, "eos_token_id", *_HARMLESS}
    }
    return ids, _follow(fields, given, vocab_size)


def _follow(fields: Config, given: dict[str, Any], vocab_size: int) -> GenerationDefaults:
    followed = {}
    for name, value in sorted(given.items()):
        if name in GenerationDefaults.model_fields:
            if name not in _NOTHING or value != _NOTHING[name]:
                followed[name] = value
        elif name not in _NEUTRAL or value not in _NEUTRAL[name]:
            raise CheckpointError(
                f"{fields.source}: field '{name:.60}' is {value!r:.60}, which is not followed",
                hint=f"text would differ from transformers'; --ignore-config-field {name:.60} goes "
                "on without it",
            )
    try:
        defaults = GenerationDefaults.model_validate_json(json.dumps(followed), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else min(followed)
        raise CheckpointError(
            f"{fields.source}: field '{name}' can't be {given[name]!r:.60}: {first['msg']}",
            hint=_HINT.format(name),
        ) from error
    if max(defaults.suppress_tokens, default=0) >= vocab_size:
        raise CheckpointError(
            f"{fields.source}: field 'suppress_tokens' has token ids outside 0..{vocab_size - 1}",
            hint=_HINT.format("suppress_tokens"),
        )
    return defaults
