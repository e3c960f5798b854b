"""tokenizer.json files that are damaged, or ask for what can't be done."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bundles import Rng

Fields = dict[str, Any]


def spoil_tokenizer(path: Path, rng: Rng) -> str:
    """Makes a sound tokenizer.json hostile; returns how."""
    if rng.random() < 0.25:
        return _spoil_text(path, rng)
    fields = json.loads(path.read_text(encoding="utf-8"))
    change = CHANGES[rng.integers(len(CHANGES))]
    change(fields, rng)
    path.write_text(json.dumps(fields), encoding="utf-8")
    return f"tokenizer.json: {change.__name__.strip('_').replace('_', ' ')}"


def _spoil_text(path: Path, rng: Rng) -> str:
    data = path.read_bytes()
    texts = {
        "empty": b"",
        "cut in the middle": data[: int(rng.integers(len(data)))],
        "not UTF-8": data.replace(b'"vocab"', b'"voc\xff\xfeab"'),
        "an empty object": b"{}",
        "null": b"null",
        "nested deeply": b"[" * 100_000,
        "a list": b"[1, 2]",
    }
    how = sorted(texts)[rng.integers(len(texts))]
    path.write_bytes(texts[how])
    return f"tokenizer.json: {how}"


def _padding_of_a_billion(fields: Fields, rng: Rng) -> None:
    fields["padding"] = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }


def _padding_to_a_multiple_of_zero(fields: Fields, rng: Rng) -> None:
    _padding_of_a_billion(fields, rng)
    fields["padding"].update(
        strategy="BatchLongest", pad_to_multiple_of=int(rng.integers(2)) * 10**9
    )


def _truncation_without_room(fields: Fields, rng: Rng) -> None:
    fields["truncation"] = {
        "direction": "Right",
        "max_length": int(rng.integers(3)),
        "strategy": "LongestFirst",
        "stride": int(rng.integers(1, 9)),
    }


def _empty_vocabulary(fields: Fields, rng: Rng) -> None:
    fields["model"].update(vocab={}, merges=[])


def _ids_beyond_the_model(fields: Fields, rng: Rng) -> None:
    vocab = fields["model"]["vocab"]
    beyond = [2**31, 2**32 - 1, 10**6, 321][rng.integers(4)]
    fields["model"]["vocab"] = {token: beyond - i for i, token in enumerate(vocab)}


def _merges_of_missing_tokens(fields: Fields, rng: Rng) -> None:
    fields["model"]["merges"] = [["no such", "token"], ["\u0000", "é"]]


def _unigram_without_unknown(fields: Fields, rng: Rng) -> None:
    fields["model"] = {
        "type": "Unigram",
        "unk_id": None,
        "vocab": [["a", -1.0]],
        "byte_fallback": False,
    }


def _unigram_with_unknown_beyond(fields: Fields, rng: Rng) -> None:
    fields["model"] = {
        "type": "Unigram",
        "unk_id": 99,
        "vocab": [["a", -1.0]],
        "byte_fallback": False,
    }


def _precompiled_garbage(fields: Fields, rng: Rng) -> None:
    garbage = base64.b64encode(rng.bytes(int(rng.integers(1, 64)))).decode()
    fields["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": garbage}


def _broken_pattern(fields: Fields, rng: Rng) -> None:
    pattern = ["(", "(?<=a*)b", "[z-a]", "(a*)*" * 20][rng.integers(4)]
    fields["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _strip_beyond_the_text(fields: Fields, rng: Rng) -> None:
    fields["decoder"] = {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}


def _template_of_unknown_tokens(fields: Fields, rng: Rng) -> None:
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "[X]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[X]": {"id": "[X]", "ids": [2**32 - 1], "tokens": ["[X]"]}},
    }


def _wordlevel_without_unknown(fields: Fields, rng: Rng) -> None:
    fields["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}


def _another_version(fields: Fields, rng: Rng) -> None:
    fields["version"] = "99.0"


def _decoder_replaces_nothing(fields: Fields, rng: Rng) -> None:
    fields["decoder"] = {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}


def _dropout_beyond_one(fields: Fields, rng: Rng) -> None:
    fields["model"]["dropout"] = [2.0, -1.0, 1.0, 0.5][rng.integers(4)]


CHANGES: tuple[Callable[[Fields, Rng], None], ...] = (
    _padding_of_a_billion,
    _padding_to_a_multiple_of_zero,
    _truncation_without_room,
    _empty_vocabulary,
    _ids_beyond_the_model,
    _merges_of_missing_tokens,
    _unigram_without_unknown,
    _unigram_with_unknown_beyond,
    _precompiled_garbage,
    _broken_pattern,
    _strip_beyond_the_text,
    _template_of_unknown_tokens,
    _wordlevel_without_unknown,
    _another_version,
    _decoder_replaces_nothing,
    _dropout_beyond_one,
)
