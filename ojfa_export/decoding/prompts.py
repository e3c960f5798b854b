"""Prompts as callers give them: text or token ids, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import is_whole, listed, whole_number

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
_WANTED = "text, token ids, or a list of these"


def listed_prompts(prompts: Prompts) -> list[Prompt]:
    """A list of prompts, of one or of several; a list of numbers is one prompt.

    Raises:
        UsageError: None of these, or no prompt at all.
    """
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = listed("a prompt", prompts, lambda each: each, _WANTED)
    if not several:
        raise UsageError("no prompt was given")
    return [several] if any(map(is_whole, several)) else several


def check_token_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids of a prompt.

    Raises:
        UsageError: Something else, or one outside the model.
    """
    if type(prompt) is list and set(map(type, prompt)) == {int}:  # as a rule, and soon seen
        return check_known(prompt.copy(), vocab_size)
    return check_known(listed("a prompt", prompt, _token_id, _WANTED), vocab_size)


def check_known(ids: list[int], vocab_size: int) -> list[int]:
    """The same ids: a tokenizer may have tokens that its model doesn't.

    Raises:
        UsageError: One is outside the model.
    """
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UsageError(
            f"the prompt has token ids outside 0..{vocab_size - 1}",
            hint="was it encoded with another model's tokenizer, or with a token that was added to "
            "the tokenizer and not to the model?",
        )
    return ids


def _token_id(value: Any) -> int:
    return whole_number("a token id of a prompt", value)
