"""A checkpoint's chat templates, from the files that transformers finds them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ojfa_export.errors import CheckpointError, OjfaError
from ojfa_export.models import chat_template
from ojfa_export.models.chat_format import DEFAULT, LIMIT, ChatFormat
from ojfa_export.models.checkpoint.fields import read_fields
from ojfa_export.system.files import read_regular

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
FILE, MORE = "chat_template.jinja", "additional_chat_templates"
# What an answer is in the chat that shows where the assistant's turn ends.
_ANSWER = "\U000f0002"


def read_chat(directory: Path, tokenizer: Tokenizer) -> ChatFormat | None:
    """Reads the chat templates of a checkpoint.

    Files beside the config are taken before what stands in it, as transformers does.

    Args:
        directory: The checkpoint's.
        tokenizer: The checkpoint's.

    Returns:
        None where it has none.

    Raises:
        CheckpointError: A template is damaged or too long.
    """
    templates = _from_files(directory) or _from_config(directory)
    if not templates:
        return None
    size = sum(len(each.encode()) for each in templates.values())
    if size > LIMIT:
        raise CheckpointError(
            f"the chat templates of {directory} have {size:,} bytes, more than {LIMIT:,}",
            hint="download the checkpoint again",
        )
    for name, template in templates.items():
        try:
            chat_template.check(template)
        except ValueError as error:
            raise CheckpointError(
                f"the chat template '{name}' of {directory} is no Jinja template: {error}",
                hint="download the checkpoint again",
            ) from error
    found = ChatFormat(templates=templates, special_tokens=_special_tokens(directory))
    return found.model_copy(update={"end_token_ids": _end(found, tokenizer)})


def _from_files(directory: Path) -> dict[str, str]:
    paths = {path.stem: path for path in sorted((directory / MORE).glob("*.jinja"))}
    if (directory / FILE).exists():
        paths[DEFAULT] = directory / FILE
    try:
        return {name: read_regular(path, LIMIT).decode() for name, path in paths.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"a chat template of {directory} can't be read: {error}",
            hint="download the checkpoint again",
        ) from error


def _from_config(directory: Path) -> dict[str, str]:
    value = _fields(directory / CONFIG).get("chat_template")
    if value is None:
        return {}
    named = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    try:
        found = {each["name"]: each["template"] for each in named}
    except (TypeError, KeyError):
        found = {"": None}
    if not all(isinstance(each, str) for pair in found.items() for each in pair):
        raise CheckpointError(
            f"chat_template in {directory / CONFIG} is neither text nor a list of named texts",
            hint="download the checkpoint again",
        )
    return found


def _special_tokens(directory: Path) -> dict[str, str | list[str]]:
    """The special tokens by name: of the map, then of the config."""
    found: dict[str, str | list[str]] = {}
    for file in (SPECIAL, CONFIG):
        for name, value in _fields(directory / file).items():
            if name.endswith("_token") and isinstance(content := _content(value), str):
                found[name] = content
            elif name in ("additional_special_tokens", "extra_special_tokens"):
                contents = [_content(each) for each in value] if isinstance(value, list) else []
                found[name] = [each for each in contents if isinstance(each, str)]
    return found


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _fields(path: Path) -> dict[str, Any]:
    return read_fields(path) if path.exists() else {}


def _end(chat: ChatFormat, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that the template writes after an answer, if it is one token."""
    template = chat.template(with_tools=False)
    if template is None:
        return ()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = chat_template.render(
            template, messages, chat.special_tokens, add_generation_prompt=False
        )
    except OjfaError:  # it takes other chats
        return ()
    _, _, rest = text.partition(_ANSWER)
    added = tokenizer.get_added_tokens_decoder()
    rest = rest.lstrip()
    ends = [number for number, token in added.items() if rest.startswith(token.content)]
    return tuple(ends[:1]) if rest else ()
