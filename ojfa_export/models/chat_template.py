"""Rendering a chat by a checkpoint's Jinja template, as transformers' `apply_chat_template` does.

Templates come with checkpoints, so they are code of strangers: they run in Jinja's sandbox, see
nothing but plain JSON values, and have limits (`models.template_limits`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from ojfa_export.errors import OjfaError, UsageError
from ojfa_export.models.template_limits import TooMuch, limited_environment, metered, watch
from ojfa_export.system.arguments import shown, text

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

# Levels of values in a message or a tool.
MOST_DEPTH = 100
# Names that a message's reasoning is passed under; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
Message = Mapping[str, Any]


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a chat.

    Args:
        template: Jinja.
        messages: Each with a "role", and mostly a "content"; what else templates read.
        special_tokens: By the names that templates read.
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: Whether the text ends where the assistant's answer begins.
        variables: What else the template reads, such as `enable_thinking`.

    Raises:
        UsageError: The template refuses the chat, fails on it, or takes too long.
        OjfaError: jinja2 is not installed.
    """
    given = [_aliased(_plain(message)) for message in messages]
    extra = {**special_tokens, **_plain(dict(variables or {}))}
    compiled = _compiled(template)
    from jinja2 import TemplateError

    try:
        with metered():
            return compiled.render(
                messages=given,
                tools=None if tools is None else _plain(list(tools)),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **extra,
            )
    except TooMuch as error:
        raise UsageError(
            f"the model's chat template is stopped on this chat: {error}",
            hint="shorten the chat; if that doesn't help, the template is broken: give a prompt",
        ) from error
    except TemplateError as error:  # `raise_exception` of the template is one as well
        raise UsageError(
            f"the model's chat template refuses this chat: {_line(error)}",
            hint="look at the roles and their order; the template says what it takes",
        ) from error
    except Exception as error:  # whatever a template of strangers does with values
        raise UsageError(
            f"the model's chat template fails on this chat: {_line(error)}",
            hint="give each message a role and a content that the template knows",
        ) from error


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """The same messages of plain JSON values.

    Raises:
        UsageError: There is something else in one.
    """
    return [_plain(message) for message in messages]


def literal_text(template: str) -> str:
    """All text and all strings of a template, with NUL characters between them."""
    from jinja2 import nodes

    tree = _environment().parse(template)
    found = {each.data for each in tree.find_all(nodes.TemplateData)}
    found |= {each.value for each in tree.find_all(nodes.Const) if isinstance(each.value, str)}
    return "\0".join(sorted(found))


def check(template: str) -> None:
    """Refuses what is no template.

    Raises:
        ValueError: In words.
    """
    from jinja2 import TemplateError

    try:
        _compiled(template)
    except (TemplateError, RecursionError) as error:
        raise ValueError(_line(error)) from error


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    environment = _environment()
    compiled: Template = environment.from_string(watch(environment.parse(template)))
    return compiled


def _environment() -> Any:
    """The environment that transformers renders in."""
    try:
        from jinja2.ext import Extension, loopcontrols
    except ImportError as error:
        raise OjfaError(
            "chats need jinja2, which is not installed", hint="pip install 'ojfa-export[chat]'"
        ) from error

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says: here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Node:
            from jinja2.nodes import CallBlock

            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return str(caller())

    environment = limited_environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
    # A function: the class itself would be a way to others.
    environment.globals |= {"dict": _dict, "raise_exception": _refuse, "strftime_now": _now}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _dict(*values: Any, **named: Any) -> dict[str, Any]:
    return dict(*values, **named)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _plain(value: Any, depth: int = 0) -> Any:
    """The same of plain JSON values, which have no methods that a template could misuse.

    Raises:
        UsageError: There is something else in it.
    """
    if depth > MOST_DEPTH:
        raise UsageError(
            f"a chat holds values that are nested more than {MOST_DEPTH} deep",
            hint="give text, and lists and dictionaries of few levels",
        )
    if isinstance(value, str):
        return text("a text of a chat", str(value))
    if value is None or type(value) in (int, float, bool):
        return value
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(each, depth + 1) for each in value]
    raise UsageError(
        f"a chat holds {shown(value)}, which is no JSON value",
        hint="give text, numbers, lists and dictionaries",
    )


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is None, its reasoning under the names that templates read."""
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
