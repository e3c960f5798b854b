"""What the files beside tokenizer.json ask for that it doesn't do by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ojfa_export.models.checkpoint.fields import read_fields

CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def has_more(directory: Path) -> bool:
    """Whether transformers may make another tokenizer than tokenizer.json alone says."""
    if any((directory / name).exists() for name in (CONFIG, ADDED, SPECIAL)):
        return True
    return read_fields(directory / "config.json").get("tokenizer_class") is not None


def find_unmet(directory: Path, tokenizer: Tokenizer) -> str | None:
    """What tokenizer.json lacks, in words, or None.

    Args:
        directory: The checkpoint's.
        tokenizer: Made of its tokenizer.json.

    Raises:
        CheckpointError: One of the files is damaged.
    """
    config, added, special = (_read(directory / name) for name in (CONFIG, ADDED, SPECIAL))
    known = {
        token.content: {flag: getattr(token, flag) for flag in _FLAGS}
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    for content in [*added, *_named(special), *_named(config)]:
        if content not in known:
            return f"the token {content!r:.60}"
    for token in _listed(config.get("added_tokens_decoder")):
        content = str(token.get("content"))
        flags = {flag: token[flag] for flag in _FLAGS if flag in token}
        if content not in known or not flags.items() <= known[content].items():
            return f"the token {content!r:.60}"
    if config.get("split_special_tokens"):
        return "split_special_tokens"
    return _unmet_affix(config, tokenizer)


def _unmet_affix(config: dict[str, Any], tokenizer: Tokenizer) -> str | None:
    """A beginning or an end of text that the config wants and the tokenizer doesn't give."""
    without = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    for name, given in (
        ("add_bos_token", ids[: -len(without) or None] if ids != without else []),
        ("add_eos_token", ids[len(without) :] if ids[: len(without)] == without else []),
    ):
        if isinstance(config.get(name), bool) and config[name] != bool(given):
            return name
    spaced = tokenizer.encode(" a", add_special_tokens=False).ids
    if config.get("add_prefix_space") and without != spaced:
        return "add_prefix_space"
    return None


def _read(path: Path) -> dict[str, Any]:
    return read_fields(path) if path.exists() else {}


def _named(fields: dict[str, Any]) -> Iterator[str]:
    """The special tokens of a config or a map of them, whatever kind they are."""
    for name, value in fields.items():
        if name.endswith("_token") and not name.startswith("add_"):
            values = [value]
        elif name in ("additional_special_tokens", "extra_special_tokens"):
            values = value if isinstance(value, list) else _values(value)
        else:
            continue
        for each in values:
            content = each.get("content") if isinstance(each, dict) else each
            if isinstance(content, str):
                yield content


def _listed(tokens: Any) -> list[dict[str, Any]]:
    return [each for each in _values(tokens) if isinstance(each, dict)]


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []
