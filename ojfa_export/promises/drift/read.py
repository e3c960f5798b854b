"""What a policy does to a text that is there already, many tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.drift.unit import Unit
from ojfa_export.promises.measures import round_down
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.shadow import Shadow

# Tokens whose logits are in memory at a time: 4 V bytes each.
_TOKENS_AT_ONCE = 128


def read_text(
    session: Session, token_ids: Sequence[int], policy: ExitPolicy, shadow: Shadow
) -> Unit:
    """What `Session.decide` would do token by token, in fewer and larger passes.

    A token's logits at an exit don't depend on where others stopped, so all tokens are run to each
    exit of the policy, and then to full depth, which is the shadow check of every one of them.

    Args:
        session: New, with one sequence and room for the text.
        token_ids: The text, at least one.
        policy: When tokens leave.
        shadow: Chooses the tokens that the loss is of.
    """
    blocks = session.spec.blocks
    depths = np.full(len(token_ids), blocks, np.int32)
    said = np.full((len(token_ids), len(policy.exits)), np.nan)
    differs = np.zeros(len(token_ids), np.bool_)
    for part in _parts(len(token_ids), session.spec.rotary_switch):
        new = list(token_ids[part])
        going = np.ones(len(new), np.bool_)
        choices = np.zeros(len(new), np.int64)
        for index, (depth, threshold) in enumerate(
            zip(policy.exits, policy.thresholds, strict=True)
        ):
            # Where LongRoPE begins anew, more than the new tokens run; theirs are the last.
            logits = _run(session, new, depth, first=index == 0)[-len(going) :]
            asked = session.confidence(logits, depth, policy.measure)
            said[part, index][going] = asked[going]
            leaves = going & (asked >= threshold)
            depths[part][leaves] = depth
            choices[leaves] = logits.argmax(axis=1)[leaves]
            going &= ~leaves
        full = _run(session, new, blocks, first=not policy.exits)[-len(going) :]
        differs[part] = ~going & (choices != full.argmax(axis=1))
    chosen = np.array([shadow.choose() for _ in token_ids])
    loss = float(differs[chosen].mean()) if chosen.any() else None
    return Unit(depths, round_down(said), loss)


def _run(session: Session, new: list[int], depth: int, *, first: bool) -> np.ndarray:
    if first:
        [logits] = session.advance(new, depth, every_position=True)
    else:
        [logits] = session.deepen(depth, every_position=True)
    return logits


def _parts(count: int, switch: int | None) -> Iterator[slice]:
    """Runs of tokens; none holds tokens on both sides of LongRoPE's switch."""
    start = 0
    while start < count:
        stop = min(start + _TOKENS_AT_ONCE, count)
        if switch is not None and start < switch < stop:
            stop = switch
        yield slice(start, stop)
        start = stop
