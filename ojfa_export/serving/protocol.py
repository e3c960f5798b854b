"""What clients send: fields that change nothing are passed over, others refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ojfa_export.serving.errors import HttpError, refused

MOST_PROMPTS = 64
MOST_CHOICES = 128
MOST_MESSAGES = 1024
MOST_PROMPT_TOKENS = 1 << 20
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(min_length=1, max_length=MOST_PROMPT_TOKENS)]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    """What a stream tells beside the text.

    Attributes:
        include_usage: Whether a chunk at its end says what was used.
        continuous_usage_stats: Whether each chunk also says what its choice has used so far; not
            OpenAI's, but some clients count tokens by it.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generating(_Body):
    """What completions and chat completions have in common.

    The last four fields are this server's own.

    Attributes:
        exit: Blocks to run for each token: a number, "full" or "auto".
        speculate: Whether to draft and check: the tokens of full depth.
        max_disagreement: Tokens may leave early where the bundle promises that no more than this
            share of them differs from the full model's; else they run at full depth.
        token_details: Whether to tell each token's blocks and confidence.
    """

    model: Annotated[str, Field(max_length=1024)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    exit: Annotated[int, Field(ge=1, lt=2**31)] | Literal["full", "auto"] | None = None
    speculate: bool | None = None
    max_disagreement: Annotated[float, Field(ge=0, le=1)] | None = None
    token_details: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens are asked for."""
        return self.max_tokens


class CompletionRequest(Generating):
    """The body of `/v1/completions`."""

    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class ContentPart(_Body):
    """A part of a message; of text alone."""

    type: str
    text: str | None = None


class ChatMessage(_Body):
    """A message of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[ContentPart], Field(max_length=1024)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None


class ChatRequest(Generating):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens are asked for."""
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(_Body):
    """The body of `/tokenize`: a prompt or a chat."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MOST_MESSAGES)] | None = None


# What this server can't do. A value that asks for nothing is as if it weren't there.
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": ((), "this server calls no tools"),
    "functions": ((), "this server calls no functions"),
    "tool_choice": (("none", "auto"), "this server calls no tools"),
    "function_call": (("none", "auto"), "this server calls no functions"),
    "response_format": (({"type": "text"},), "only {'type': 'text'} is possible"),
    "suffix": ((), "text can't be put before a suffix"),
    "best_of": ((1,), "only 1 is possible; n gives several answers"),
    "use_beam_search": ((), "there is no beam search"),
    "modalities": ((["text"],), "only ['text'] is possible"),
    "audio": ((), "only text is possible"),
    "web_search_options": ((), "there is no search"),
    "chat_template": ((), "the template is the bundle's; a client can't give one"),
    "guided_json": ((), "output can't be constrained"),
    "guided_regex": ((), "output can't be constrained"),
    "guided_choice": ((), "output can't be constrained"),
    "guided_grammar": ((), "output can't be constrained"),
    "structured_outputs": ((), "output can't be constrained"),
    "logits_processors": ((), "code of clients isn't run"),
    "prompt_embeds": ((), "a prompt is text or token ids"),
    "prompt_logprobs": ((), "log probabilities of prompts are not given"),
    "allowed_token_ids": ((), "use logit_bias"),
    "bad_words": ((), "use logit_bias"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
}
_TEMPLATE_SWITCHES = {"enable_thinking", "thinking"}


def parse(kind: type[_Body], body: bytes) -> Any:
    """Reads a body.

    Raises:
        HttpError: 400, the field named.
    """
    try:
        read = kind.model_validate_json(body)
    except ValidationError as error:
        raise _bad(error) from None
    for name, value in (read.model_extra or {}).items():
        harmless, why = _REFUSED.get(name, ((value,), ""))
        if not any(_same(value, each) for each in (*_NOTHING, *harmless)):
            raise refused(name, why)
    if isinstance(read, Generating):
        _check_combinations(read)
    return read


def _check_combinations(body: Generating) -> None:
    """Fields that are well by themselves."""
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "only where stream is true")
    wanted = body.stream_options
    if wanted is not None and wanted.continuous_usage_stats and not wanted.include_usage:
        raise refused("stream_options.continuous_usage_stats", "only together with include_usage")
    if body.min_tokens and not body.ignore_eos:
        raise refused("min_tokens", "only together with ignore_eos")
    if body.max_disagreement is not None and body.exit is not None:
        raise refused("max_disagreement", "it chooses the exit; leave out exit")
    if body.max_disagreement is not None and body.speculate:
        raise refused("max_disagreement", "speculation never disagrees; leave out one of them")
    if body.speculate and body.exit not in (None, "full"):
        raise refused("speculate", "it gives the tokens of full depth; leave out exit")
    if isinstance(body, CompletionRequest):
        _check_completion(body)
    if isinstance(body, ChatRequest):
        _check_chat(body)


def _check_completion(body: CompletionRequest) -> None:
    if len(body.prompts()) * (body.n or 1) > MOST_CHOICES:
        raise refused("n", f"prompts times n may be {MOST_CHOICES} at most")
    if body.echo and body.logprobs is not None:
        raise refused("echo", "log probabilities of prompts are not given")


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs", "only where logprobs is true")
    for name, value in (body.chat_template_kwargs or {}).items():
        if name not in _TEMPLATE_SWITCHES or not isinstance(value, bool):
            known = ", ".join(sorted(_TEMPLATE_SWITCHES))
            raise refused("chat_template_kwargs", f"only true or false of {known}")


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def _bad(error: ValidationError) -> HttpError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # pydantic names the branches of a union too; what clients know are names and indices.
    parts = [
        str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()
    ]
    kinds = {"str", "int", "float", "bool"}
    names = [part for part in parts if part not in kinds and not part.startswith("constrained")]
    if not names:
        return HttpError(400, f"the body is no valid JSON object: {first['msg']}")
    field = ".".join(names)
    message = f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return HttpError(400, message, param=field, code=first["type"])
