"""What a checkpoint says of chats: its templates, and what they read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

# Bytes of all templates at most; the largest that are published have a fiftieth of it.
LIMIT = 1 << 20
# The template that is taken where none is named, and the one for chats with tools.
DEFAULT, WITH_TOOLS = "default", "tool_use"


class ChatFormat(BaseModel):
    """A checkpoint's chat templates, and what they read.

    Attributes:
        templates: Jinja templates by name: "default", and in some models "tool_use".
        special_tokens: By the name that templates read them under, such as "bos_token".
        end_token_ids: Tokens that end the assistant's turn, beside the model's end of text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    templates: dict[str, str]
    special_tokens: dict[str, str | list[str]]
    end_token_ids: tuple[int, ...] = ()

    @property
    def template_names(self) -> str:
        """For messages."""
        return ", ".join(sorted(self.templates))

    def template(self, *, with_tools: bool) -> str | None:
        """The template of a chat, or None where there is none for it."""
        if with_tools and WITH_TOOLS in self.templates:
            return self.templates[WITH_TOOLS]
        return self.templates.get(DEFAULT)


def parse_chat(document: bytes) -> ChatFormat:
    """Reads the file.

    Raises:
        ValueError: It is damaged, in words.
    """
    try:
        return ChatFormat.model_validate_json(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
