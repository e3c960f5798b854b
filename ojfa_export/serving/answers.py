"""What clients get: OpenAI's objects, of what the engine gave."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from ojfa_export.engine.request import FinishReason, RequestResult, RequestToken
from ojfa_export.runtime.model import Model

# Whatever isn't an end of the text by itself is a limit.
_STOPS: set[FinishReason | None] = {"end_of_text", "stop_token", "stop_string"}


def finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI's word for why a request ended."""
    if reason is None:
        return None
    return "stop" if reason in _STOPS else "length"


class Form:
    """The form of the answers to one request.

    Args:
        model: Gives texts of tokens.
        name: Of the bundle, as clients call it.
        id: Of the request.
        is_chat: Whether it is a chat completion.
        has_logprobs: Whether log probabilities were asked for.
        has_details: Whether blocks and confidence of each token were asked for.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        id: str,
        *,
        is_chat: bool,
        has_logprobs: bool,
        has_details: bool,
    ) -> None:
        self._model, self._name, self.is_chat = model, name, is_chat
        self._has_logprobs, self._has_details = has_logprobs, has_details
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{id}"
        self._created = int(time.time())
        self._object = "chat.completion" if is_chat else "text_completion"
        # Most chunks differ in their text alone: the rest of them is made once.
        head = self._head(".chunk" if is_chat else "")
        self._begin = json.dumps(head)[:-1] + ', "choices": [{"index": '
        self._middle = ', "delta": {"content": ' if is_chat else ', "text": '
        self._end = ("}" if is_chat else "") + ', "logprobs": null, "finish_reason": null}]}\n\n'

    def whole(
        self, results: Sequence[tuple[RequestResult, Sequence[RequestToken], str]], prompts: int
    ) -> dict[str, Any]:
        """The answer that isn't streamed.

        Args:
            results: Of each choice, with its tokens and what its text begins with.
            prompts: How many there were.
        """
        choices = []
        for index, (result, tokens, echoed) in enumerate(results):
            text = echoed + result.text
            choice: dict[str, Any] = {"index": index}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choice["logprobs"] = self._logprobs(tokens, len(echoed))
            choice["finish_reason"] = finish_reason(result.finish_reason)
            choice |= self._ours(tokens, result.finish_reason)
            choices.append(choice)
        usage = usage_of([result for result, _, _ in results], prompts)
        return {**self._head(), "choices": choices, "usage": usage}

    def first(self, index: int, echoed: str) -> bytes | None:
        """The chunk before any token, if there is one."""
        if self.is_chat:
            delta = {"role": "assistant", "content": ""}
            return self._event(index, {"delta": delta, "logprobs": None, "finish_reason": None})
        return self._text(index, echoed) if echoed else None

    def chunk(
        self,
        index: int,
        tokens: Sequence[RequestToken],
        before: int,
        used: tuple[int, int] | None = None,
    ) -> bytes | None:
        """The chunk of tokens that came together; None where there is nothing to say yet.

        Args:
            index: Of the choice.
            tokens: At least one.
            before: Characters of the text so far.
            used: Tokens of the choice's prompt, and generated so far, where chunks say so.
        """
        text = "".join([token.text for token in tokens])
        reason = tokens[-1].finish_reason
        is_plain = reason is None and not self._has_logprobs and not self._has_details
        if is_plain and used is None:
            return self._text(index, text) if text else None
        return self._event(
            index,
            {
                **({"delta": {"content": text}} if self.is_chat else {"text": text}),
                "logprobs": self._logprobs(tokens, before),
                "finish_reason": finish_reason(reason),
                **self._ours(tokens, reason),
            },
            used,
        )

    def last(
        self, index: int, text: str, reason: FinishReason, used: tuple[int, int] | None = None
    ) -> bytes:
        """The chunk of a request that ended without a token that says so."""
        delta = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        fields = {**delta, "logprobs": None, "finish_reason": finish_reason(reason)}
        return self._event(index, {**fields, "finish_detail": reason}, used)

    def usage(self, results: Sequence[RequestResult], prompts: int) -> bytes:
        """The chunk that says what was used."""
        head = self._head(".chunk" if self.is_chat else "")
        return event({**head, "choices": [], "usage": usage_of(results, prompts)})

    def _head(self, suffix: str = "") -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._object + suffix,
            "created": self._created,
            "model": self._name,
            "system_fingerprint": None,
        }

    def _event(
        self, index: int, fields: dict[str, Any], used: tuple[int, int] | None = None
    ) -> bytes:
        made = self._head(".chunk" if self.is_chat else "")
        made["choices"] = [{"index": index, **fields}]
        if used is not None:
            prompt, new = used
            counts = {"prompt_tokens": prompt, "completion_tokens": new}
            made["usage"] = {**counts, "total_tokens": prompt + new}
        return event(made)

    def _text(self, index: int, text: str) -> bytes:
        text = json.dumps(text)
        return f"data: {self._begin}{index}{self._middle}{text}{self._end}".encode()

    def _ours(self, tokens: Sequence[RequestToken], reason: FinishReason | None) -> dict[str, Any]:
        ours: dict[str, Any] = {"finish_detail": reason} if reason is not None else {}
        if self._has_details:
            ours["tokens"] = [
                {
                    "id": token.id,
                    "text": token.text,
                    "blocks_run": token.blocks_run,
                    "confidence": token.logprobs and math.exp(token.logprobs.logprob),
                    "drafted": token.drafted,
                }
                for token in tokens
            ]
        return ours

    def _logprobs(self, tokens: Sequence[RequestToken], before: int) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        found = [(token, token.logprobs) for token in tokens if token.logprobs is not None]
        if self.is_chat:
            return {
                "content": [
                    {
                        **self._named(token.id, logprobs.logprob),
                        "top_logprobs": [self._named(*each) for each in logprobs.top],
                    }
                    for token, logprobs in found
                ],
                "refusal": None,
            }
        offsets = []
        for token, _ in found:
            offsets.append(before)
            before += len(token.text)
        return {
            "tokens": [self._token(token.id) for token, _ in found],
            "token_logprobs": [logprobs.logprob for _, logprobs in found],
            "top_logprobs": [
                {self._token(id): logprob for id, logprob in logprobs.top} for _, logprobs in found
            ],
            "text_offset": offsets,
        }

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._token(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _token(self, id: int) -> str:
        text: str = self._model.tokenizer.decode([id], skip_special_tokens=False)
        return text


def usage_of(results: Sequence[RequestResult], prompts: int) -> dict[str, Any]:
    """What requests used; a prompt that had several answers counts once."""
    each = max(len(results) // max(prompts, 1), 1)
    prompt = sum(result.usage.prompt_tokens for result in results[::each])
    cached = sum(result.usage.cached_tokens for result in results[::each])
    new = sum(result.usage.new_tokens for result in results)
    blocks = sum(sum(result.exit_blocks) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "blocks_per_token": blocks / max(new, 1),
    }


def event(fields: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(fields)}\n\n".encode()
