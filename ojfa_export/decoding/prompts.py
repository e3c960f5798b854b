"""Prompts as callers give them: text or token ids, one or many."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from ojfa_export.errors import UsageError

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]


def listed_prompts(prompts: Prompts) -> list[Prompt]:
    """A list of prompts, of one or of several; a list of numbers is one prompt.

    Raises:
        UsageError: None of these, or no prompt at all.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise UsageError(
            f"a prompt is neither text nor token ids: {prompts!r:.40}",
            hint="give a str, a list of token ids, or a list of these",
        )
    several = list(prompts)
    if not several:
        raise UsageError("no prompt was given")
    if all(hasattr(each, "__index__") for each in several):
        return [several]  # type: ignore[list-item]
    return several  # type: ignore[return-value]


def check_token_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids of a prompt.

    Raises:
        UsageError: Something else, or one outside the model.
    """
    try:
        ids = [operator.index(each) for each in prompt]
    except TypeError:
        raise UsageError(
            f"a prompt is neither text nor token ids: {prompt!r:.40}",
            hint="give a str, or a list of whole numbers",
        ) from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UsageError(
            f"the prompt has token ids outside 0..{vocab_size - 1}",
            hint="was it encoded with another model's tokenizer?",
        )
    return ids
