"""Golden tokens: short greedy continuations that a bundle must reproduce wherever it runs."""

from __future__ import annotations

import numpy as np

from ojfa_export.backends.backend import Engines, Int32
from ojfa_export.bundle.manifest import Golden
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.session import Session

PROMPT_TOKENS = 16
NEW_TOKENS = 8
# A token is golden only if it leads the second by this share of the largest logit: another
# processor sums in another order, and must not be blamed for turning a near tie.
LEAD = 0.01


def make_golden(
    spec: ModelSpec, engines: Engines, windows: Int32, max_length: int
) -> tuple[Golden, ...]:
    """Generates golden tokens at full depth and at half depth.

    Args:
        spec: The model.
        engines: The bundle's engines.
        windows: [n, length] token ids to take prompts from.
        max_length: Tokens that the bundle's cache holds, prompt and continuation.
    """
    golden = []
    for exit in (spec.blocks, max(1, spec.blocks // 2)):
        for window in windows[:8]:
            prompt = window[: max(1, min(PROMPT_TOKENS, max_length // 2))].tolist()
            new_tokens = min(NEW_TOKENS, max_length - len(prompt))
            if tokens := _continue(spec, engines, prompt, exit, new_tokens):
                golden.append(
                    Golden(exit=exit, prompt_token_ids=tuple(prompt), token_ids=tuple(tokens))
                )
                break
    return tuple(golden)


def _continue(
    spec: ModelSpec, engines: Engines, prompt: list[int], exit: int, new_tokens: int
) -> list[int]:
    """Greedy tokens up to the first that does not lead clearly."""
    session = Session(spec, engines, 1, len(prompt) + new_tokens)
    tokens: list[int] = []
    logits = session.advance(prompt, exit)[0]
    while len(tokens) < new_tokens:
        second, first = np.partition(logits, -2)[-2:]
        if first - second < LEAD * np.abs(logits).max():
            break
        tokens.append(int(logits.argmax()))
        logits = session.advance(tokens[-1:], exit)[0]
    return tokens
