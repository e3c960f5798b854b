"""What decides the result of each stage of a build: stages whose keys are the same are reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ojfa_export.compiler.check_stage import may_check
from ojfa_export.compiler.draft_head import draft_vocabulary
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.versions import tool_versions
from ojfa_export.decoding.arrays import Int32
from ojfa_export.promises.statistics import SPLITS
from ojfa_export.promises.windows import tuning_part


def stage_keys(inputs: Inputs) -> dict[str, str]:
    """A digest for each stage that a build of these inputs has, in their order.

    Each is of what the stage reads and of the keys of the stages whose files it reads.
    """
    checkpoint, settings, backend = inputs.checkpoint, inputs.settings, inputs.backend
    given, windows = inputs.given, inputs.windows
    texts = [[text.name, text.domain] for text in inputs.texts]
    chat = inputs.chat and inputs.chat.model_dump()
    model = [inputs.model_sha256, inputs.tokenizer.to_str(), chat, tool_versions()]
    keys: dict[str, str] = {}
    form = inputs.weight_format
    keys["export"] = _digest(
        *model,
        [settings.precision, form and form.model_dump()],
        settings.max_cache_length,
        None if inputs.fitted_text is None else _tokens(inputs.fitted_text),
    )
    keys["engines"] = _digest(keys["export"], backend.name, backend.versions())
    keys["text"] = _digest(keys["engines"], _tokens(inputs.calibrated))
    keys["calibrate"] = _digest(
        keys["text"],
        len(windows.fit),
        settings.rank,
        [given.kind, str(given.exits_path), given.digests.get(given.exits_path)],
        [inputs.name, texts],  # for the report
    )
    if given.draft is not None:
        draft = given.digests.get(given.draft_path)
        size = draft_vocabulary(inputs)
        counted = [_tokens(windows.fit), *map(_tokens, map(tuning_part, windows.rest))]
        keys["draft"] = _digest(
            keys["engines"], draft, _tokens(windows.held_out), [size, counted if size else []]
        )
    if inputs.self_text is not None:
        rest = [_tokens(each) for each in windows.rest]
        keys["self-text"] = _digest(*model, texts, rest, inputs.self_text.fingerprint())
    if may_check(inputs):
        counted = [_tokens(each) for each in (windows.held_out, *map(tuning_part, windows.rest))]
        keys["check"] = _digest(
            keys["calibrate"],
            [settings.check_vocabulary, checkpoint.spec.eos_token_ids],
            [_tokens(windows.fit), counted, keys.get("self-text")],
        )
    if inputs.decides_exits:
        keys |= _deciding_keys(inputs, keys, texts)
    keys["verify"] = _digest(
        list(keys.values()),
        [inputs.name, inputs.options.revision, inputs.options.ignore_config_fields],
        [checkpoint.spec.eos_token_ids, checkpoint.generation.model_dump()],
        [[text.sha256, text.size] for text in inputs.texts],
        settings.max_batch_size,
    )
    return keys


def fingerprint(inputs: Inputs) -> str:
    """Digest of everything that decides the result."""
    return _digest(stage_keys(inputs))


def _deciding_keys(
    inputs: Inputs, keys: dict[str, str], texts: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Of the stages that look at exits."""
    found, limits, plan = inputs.statistics_windows, inputs.options.limits, inputs.self_text
    asked = limits and limits.model_dump()
    made: dict[str, str] = {}

    def windows(*names: str) -> list[Any] | None:
        """What stands for splits' windows of the files."""
        if found is None:
            return None
        return [[_tokens(each) for each in found.of(name)] for name in names]

    made["statistics"] = _digest(
        keys["calibrate"],
        found and [found.domains, found.given, found.sampled],
        windows(*(SPLITS if limits is None else SPLITS[:1])),
        keys.get("self-text"),
        *([keys["check"]] if "check" in keys else []),
    )
    if limits is not None:
        made["certification"] = _digest(made["statistics"], windows(*SPLITS[1:]), asked)
    made["exits"] = _digest(
        list(made.values()), keys.get("draft"), asked, texts, plan and plan.about
    )
    return made


def _tokens(ids: Int32) -> list[Any]:
    """What stands for windows of tokens."""
    return [list(ids.shape), hashlib.sha256(ids.tobytes()).hexdigest()]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
