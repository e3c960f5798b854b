"""From a body to prompts and options of the engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, cast

from ojfa_export.decoding.options import ExitChoice, GenerationOptions
from ojfa_export.errors import BundleError, OjfaError, UsageError
from ojfa_export.runtime.model import Model
from ojfa_export.serving.errors import HttpError, of_engine, refused
from ojfa_export.serving.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Generating,
    TokenizeRequest,
)

# OpenAI's completions end after so many where nothing is said.
DEFAULT_COMPLETION_TOKENS = 16
_ROLES = {"developer": "system"}  # the newer name; templates know the older


@dataclass(frozen=True)
class Asked:
    """What the engine is asked for.

    Attributes:
        prompts: Token ids of each.
        options: For each choice of each prompt, prompt by prompt.
        echoed: Texts that each choice begins with.
    """

    prompts: list[list[int]]
    options: list[list[GenerationOptions]]
    echoed: list[str]


def completion(model: Model, body: CompletionRequest, exit: ExitChoice) -> Asked:
    """What a completion asks for.

    Raises:
        HttpError: 400.
    """
    given = body.prompts()
    prompts = [_encode(model, prompt) for prompt in given]
    echoed = [""] * len(given)
    if body.echo:
        decode = model.tokenizer.decode
        echoed = [each if isinstance(each, str) else decode(each) for each in given]
    options = _options(model, body, exit, body.most_tokens or DEFAULT_COMPLETION_TOKENS)
    return Asked(prompts, [_choices(options, body) for _ in prompts], echoed)


def chat(model: Model, body: ChatRequest, exit: ExitChoice) -> Asked:
    """What a chat completion asks for.

    Raises:
        HttpError: 400.
    """
    ids = encode_chat(model, body.messages, body.chat_template_kwargs or {})
    # What the cache has room for, where nothing is said.
    most = body.most_tokens or max(model.manifest.cache.max_length - len(ids) + 1, 1)
    options = model.chats.ending(_options(model, body, exit, most))
    return Asked([ids], [_choices(options, body)], [""])


def tokens(model: Model, body: TokenizeRequest) -> list[int]:
    """The token ids of a prompt or a chat.

    Raises:
        HttpError: 400.
    """
    if (body.prompt is None) == (body.messages is None):
        raise refused("prompt", "give either prompt or messages")
    if body.prompt is not None:
        return _encode(model, body.prompt)
    return encode_chat(model, body.messages or [], {})


def encode_chat(model: Model, messages: list[ChatMessage], variables: dict[str, Any]) -> list[int]:
    """The prompt of a chat; what users write makes no special tokens.

    Raises:
        HttpError: 400.
    """
    plain = [_plain(index, message) for index, message in enumerate(messages)]
    try:
        return model.encode(model.chats.encode(plain, **variables))
    except BundleError:  # its message is for whoever has the files
        raise refused(
            "messages", "the model has no usable chat template; take /v1/completions"
        ) from None
    except UsageError as error:
        raise of_engine(error, "messages") from error
    except OjfaError as error:  # the tokenizer fails on it
        raise HttpError(400, f"messages: {error.message}", param="messages") from error


def _plain(index: int, message: ChatMessage) -> dict[str, Any]:
    where = f"messages.{index}"
    for name in ("tool_calls", "function_call", "tool_call_id"):
        if (message.model_extra or {}).get(name):
            raise refused(f"{where}.{name}", "this server calls no tools")
    content = message.content
    if isinstance(content, list):
        for at, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise refused(f"{where}.content.{at}", "only parts of the type 'text' are possible")
        content = "".join(part.text or "" for part in content)
    made = {"role": _ROLES.get(message.role, message.role), "content": content or ""}
    return made if message.name is None else {**made, "name": message.name}


def _encode(model: Model, prompt: str | list[int]) -> list[int]:
    try:
        return model.encode(prompt)
    except UsageError as error:
        raise of_engine(error, "prompt") from error
    except OjfaError as error:
        raise HttpError(400, f"prompt: {error.message}", param="prompt") from error


def _choices(options: GenerationOptions, body: Generating) -> list[GenerationOptions]:
    """One for each of `n`; each draws from random numbers of its own."""
    fields = {name: getattr(options, name) for name in vars(options)}
    seeds = [(options.seed + index) % 2**63 for index in range(body.n or 1)]
    return [GenerationOptions(**{**fields, "seed": seed}) for seed in seeds]


def _options(model: Model, body: Generating, exit: ExitChoice, most: int) -> GenerationOptions:
    logprobs = body.logprobs if isinstance(body, CompletionRequest) else None
    if isinstance(body, ChatRequest) and body.logprobs:
        logprobs = body.top_logprobs or 0
    if logprobs is None and body.token_details:
        logprobs = 0  # the confidence is the probability of the token
    try:
        options = GenerationOptions(
            exit=_exit(model, body, exit),
            speculate=bool(body.speculate),
            max_new_tokens=most,
            # As OpenAI's: sampled, at the bundle's own temperature or at 1.
            sample=body.temperature is None,
            temperature=body.temperature,
            top_k=None if body.top_k in (None, 0, -1) else body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            seed=secrets.randbits(62) if body.seed is None else body.seed % 2**63,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=_biases(body),
            stop=body.stop or (),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
        )
        # What doesn't depend on the prompt is refused before anything of the request begins.
        completed = options.completed(model.manifest.generation)
        completed.check_fits(
            model.blocks,
            model.spec.vocab_size,
            has_layer=model.drafts is not None,
            served=model.exits,
        )
        assert options.exit is not None
        model.resolve_exit(options.exit)
    except BundleError:
        raise refused("exit", "the bundle has no policy for 'auto'") from None
    except OjfaError as error:
        raise of_engine(error) from error
    return options


def _exit(model: Model, body: Generating, exit: ExitChoice) -> ExitChoice:
    if body.speculate:
        return "full"
    if body.exit is not None:
        return body.exit
    if body.max_disagreement is not None:
        promise = model.manifest.promise
        kept = promise is not None and promise.limits.max_disagreement <= body.max_disagreement
        return cast(ExitChoice, "auto" if kept and model.manifest.auto is not None else "full")
    return exit


def _biases(body: Generating) -> dict[int, float]:
    biases = {}
    for name, value in (body.logit_bias or {}).items():
        if not name.isascii() or not name.isdecimal() or len(name) > 10:
            raise refused("logit_bias", 'its names are token ids, such as "42"')
        biases[int(name)] = value
    return biases
