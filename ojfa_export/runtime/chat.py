"""From a chat to a prompt: rendered by the bundle's template, safe from what users write.

What users write may hold the text of a special token, such as "<|im_end|>". Before the template
sees it such text is put between two characters that no text has, so that afterwards what the
template wrote itself can be told apart: that alone becomes special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import CHAT
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.errors import BundleError, UsageError
from ojfa_export.models import chat_template
from ojfa_export.models.chat_format import ChatFormat, parse_chat
from ojfa_export.models.chat_template import Message
from ojfa_export.models.tokenizer import encode, plain_tokenizer
from ojfa_export.system.arguments import instance, listed, shown

# Of the private use planes.
_BEGIN, _END = "\U000f0000", "\U000f0001"


class Chat:
    """Renders and encodes chats.

    Args:
        chat: The checkpoint's templates.
        tokenizer: The bundle's.
    """

    def __init__(self, chat: ChatFormat, tokenizer: Tokenizer) -> None:
        self.format, self._tokenizer = chat, tokenizer

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The chat's text: see `models.chat_template.render`.

        Raises:
            UsageError: A chat that the template doesn't take.
        """
        checked = self._checked(messages)
        return chat_template.render(
            self._template(tools),
            checked,
            self.format.special_tokens,
            tools=_checked_tools(tools),
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The chat's token ids.

        Args:
            messages: Each with a "role" and what else the template reads.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: Whether it ends where the assistant's answer begins.
            special: Whether special tokens that are written out in messages become such.
            variables: What else the template reads.

        Raises:
            UsageError: A chat that the template doesn't take.
        """
        if special:
            text = self.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
            return encode(self._tokenizer, text, add_special_tokens=False)
        control = self._control_pattern(self._template(tools))
        plain = chat_template.plain_messages(self._checked(messages))
        text = self.render(
            _marked(plain, control),
            tools=None if tools is None else _marked(_checked_tools(tools), control),
            add_generation_prompt=add_generation_prompt,
            **_marked(variables, control),
        )
        return self._encode_marked(text, control)

    def ending(self, options: GenerationOptions) -> GenerationOptions:
        """The options with the template's end of a turn among the tokens that end the text.

        Raises:
            UsageError: Something else than options.
        """
        instance("options", options, GenerationOptions)
        if options.ignore_eos:
            return options
        ends = (*options.stop_token_ids, *self.format.end_token_ids)
        return replace(options, stop_token_ids=tuple(dict.fromkeys(ends)))

    def _checked(self, messages: Any) -> list[Message]:
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise UsageError(
                f"a chat must be a list of messages, not {shown(messages)}",
                hint='such as [{"role": "user", "content": "Hello"}]',
            )
        if not messages:
            raise UsageError("a chat has no messages", hint="give one with the role 'user'")
        return [instance("a message", each, Mapping) for each in messages]  # type: ignore[type-abstract]

    def _template(self, tools: object) -> str:
        template = self.format.template(with_tools=tools is not None)
        if template is None:
            raise UsageError(
                f"the model has no default chat template, only {self.format.template_names}",
                hint="render the chat yourself, and give it as a prompt",
            )
        return template

    def _control_pattern(self, template: str) -> re.Pattern[str]:
        """Finds tokens that only the template may write: special ones, and those in its text."""
        literal = chat_template.literal_text(template)
        names = [
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if token.special or (token.content in literal and not token.content.isspace())
        ]
        longest_first = sorted(names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _encode_marked(self, text: str, control: re.Pattern[str]) -> list[int]:
        """Token ids of a text whose marked parts are plain text."""
        pieces = re.split(f"{_BEGIN}({control.pattern}){_END}|[{_BEGIN}{_END}]", text)
        ids = encode(self._tokenizer, pieces[0], add_special_tokens=False)
        for index, piece in enumerate(pieces[1:], start=1):
            if not piece:
                continue
            plain = index % 2 == 1
            found = self._encode_inside(piece, plain=plain)
            if plain and self._tokenizer.token_to_id(piece) in found:
                raise UsageError(
                    f"the chat holds {shown(piece)}, which this tokenizer can't write as text",
                    hint="leave it out of the messages",
                )
            ids += found
        return ids

    def _encode_inside(self, piece: str, *, plain: bool) -> list[int]:
        """Of a part that begins in the middle: no space is put before it, as before a text."""
        tokenizer = self._plain if plain else self._tokenizer
        line = encode(self._tokenizer, "\n", add_special_tokens=False)
        ids = encode(tokenizer, "\n" + piece, add_special_tokens=False)
        if ids[: len(line)] == line:
            return ids[len(line) :]
        return encode(tokenizer, piece, add_special_tokens=False)

    @cached_property
    def _plain(self) -> Tokenizer:
        return plain_tokenizer(self._tokenizer)


def _checked_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    found = listed("tools", tools, lambda each: instance("a tool", each, Mapping), "a list")  # type: ignore[type-abstract]
    return list(found)


def _marked(value: Any, control: re.Pattern[str]) -> Any:
    """The same with special tokens that are written out in texts between the two characters."""
    if isinstance(value, str):
        text = value.replace(_BEGIN, "").replace(_END, "")  # nobody marks by himself
        return control.sub(f"{_BEGIN}\\g<0>{_END}", text)
    if isinstance(value, Mapping):
        return {name: _marked(each, control) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(each, control) for each in value]
    return value


def open_chat(bundle: Bundle, tokenizer: Tokenizer) -> Chat:
    """The chats of a bundle.

    Raises:
        BundleError: It has no chat template, or a damaged one.
    """
    if CHAT not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.directory} has no chat template: its checkpoint has none",
            hint="give a prompt instead: -p TEXT, or generate()",
        )
    try:
        return Chat(parse_chat(bundle.read(CHAT)), tokenizer)
    except ValueError as error:
        raise BundleError(
            f"{bundle.directory / CHAT} is damaged: {error}", hint="build the bundle again"
        ) from error
