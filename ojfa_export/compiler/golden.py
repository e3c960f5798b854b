"""Golden tokens: short greedy continuations that a bundle must reproduce wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ojfa_export.backends.backend import Engines
from ojfa_export.bundle.check_entry import DecidedGolden
from ojfa_export.bundle.manifest import Golden
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.decoding.exits import nearest_exit
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session

PROMPT_TOKENS = 16
NEW_TOKENS = 8
# A token is golden only if it leads the second by this share of the largest logit: another
# processor sums in another order, and must not be blamed for turning a near tie. In bf16 engines
# that round what they multiply are off by some percent of what others give.
LEAD: Mapping[Precision, float] = {"fp32": 0.01, "fp16": 0.01, "bf16": 0.06}


def make_golden(
    spec: ModelSpec, engines: Engines, windows: Int32, max_length: int, precision: Precision
) -> tuple[Golden, ...]:
    """Generates golden tokens at full depth and at half depth, or the exit nearest to that.

    Where no token leads clearly, as of random weights, the one that leads most is golden at full
    depth: a bundle without any could not be verified.

    Args:
        spec: The model.
        engines: The bundle's engines.
        windows: [n, length] token ids to take prompts from.
        max_length: Tokens that the bundle's cache holds, prompt and continuation.
        precision: Of the bundle.
    """
    golden, clearest = [], (-1.0, ([0], [0]))
    for exit in dict.fromkeys((spec.blocks, _middle_exit(spec, engines))):
        for window in windows[:8]:
            prompt = window[: max(1, min(PROMPT_TOKENS, max_length // 2))].tolist()
            new_tokens = min(NEW_TOKENS, max_length + 1 - len(prompt))
            tokens, lead = _continue(spec, engines, prompt, exit, new_tokens, LEAD[precision])
            if tokens:
                golden.append(_golden(exit, prompt, tokens))
                break
            if exit == spec.blocks and lead.share > clearest[0]:
                clearest = lead.share, (prompt, [lead.token])
    return tuple(golden) or (_golden(spec.blocks, *clearest[1]),)


def decided_golden(
    spec: ModelSpec, engines: Engines, windows: Int32, max_length: int, precision: Precision
) -> DecidedGolden | None:
    """Golden tokens of a policy with one exit, near half depth, some of which leave there.

    Args:
        spec: The model.
        engines: The bundle's engines.
        windows: [n, length] token ids to take prompts from.
        max_length: Tokens that the bundle's cache holds, prompt and continuation.
        precision: Of the bundle.

    Returns:
        None where in none of the prompts a token leaves clearly, and another clearly doesn't.
    """
    clear = LEAD[precision]
    exits = (_middle_exit(spec, engines),)
    for window in windows[:8]:
        prompt = window[: max(1, min(PROMPT_TOKENS, max_length // 2))].tolist()
        count = min(NEW_TOKENS, max_length + 1 - len(prompt))
        staying = ExitPolicy(exits=exits, measure="top", thresholds=(2.0,))
        found = np.sort([each.sure for each in _decide(spec, engines, prompt, staying, count, 0)])
        if len(found) < 2:
            continue
        widest = int(np.diff(found).argmax())
        threshold = round(float(found[widest : widest + 2].mean()), 6)
        policy = staying.model_copy(update={"thresholds": (threshold,)})
        steps = _decide(spec, engines, prompt, policy, count, clear)
        depths = tuple(each.depth for each in steps)
        if len(set(depths)) > 1:
            return DecidedGolden(
                policy=policy,
                prompt_token_ids=tuple(prompt),
                token_ids=tuple(each.token for each in steps),
                blocks_run=depths,
            )
    return None


def _middle_exit(spec: ModelSpec, engines: Engines) -> int:
    behind = engines.exit_blocks
    return nearest_exit(spec.blocks // 2, None if behind is None else behind.exits)


class _Decided(NamedTuple):
    """A token of a policy with one exit, its depth, and how sure the exit was."""

    token: int
    depth: int
    sure: float


def _decide(
    spec: ModelSpec,
    engines: Engines,
    prompt: list[int],
    policy: ExitPolicy,
    new_tokens: int,
    clear: float,
) -> list[_Decided]:
    """A policy's greedy tokens up to the first that leads, or is decided, by less than `clear`."""
    session = Session(spec, engines, 1, len(prompt) + new_tokens - 1)
    pending, steps = prompt, list[_Decided]()
    while len(steps) < new_tokens:
        step = session.decide(pending, policy)
        lead, sure = _Lead.of(step.logits[0]), float(step.confidence[0, 0])
        if lead.share < clear or abs(sure - policy.thresholds[0]) < clear:
            break
        steps.append(_Decided(lead.token, int(step.blocks_run[0]), sure))
        pending = [lead.token]
    return steps


def _golden(exit: int, prompt: list[int], tokens: list[int]) -> Golden:
    return Golden(exit=exit, prompt_token_ids=tuple(prompt), token_ids=tuple(tokens))


class _Lead(NamedTuple):
    """The likeliest token, and by which share of the largest logit it leads the second."""

    token: int
    share: float

    @classmethod
    def of(cls, logits: Float32) -> _Lead:
        second, first = np.partition(logits, -2)[-2:]
        return cls(int(logits.argmax()), float((first - second) / np.abs(logits).max()))


def _continue(
    spec: ModelSpec,
    engines: Engines,
    prompt: list[int],
    exit: int,
    new_tokens: int,
    clear: float,
) -> tuple[list[int], _Lead]:
    """Greedy tokens up to the first that does not lead clearly, and that one."""
    session = Session(spec, engines, 1, len(prompt) + new_tokens - 1)
    tokens: list[int] = []
    lead = _Lead.of(session.advance(prompt, exit)[0])
    while lead.share >= clear:
        tokens.append(lead.token)
        if len(tokens) == new_tokens:
            break
        lead = _Lead.of(session.advance(tokens[-1:], exit)[0])
    return tokens, lead
