"""What a session tells whoever listens, as it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExitTaken:
    """A token was computed.

    Attributes:
        row: Which sequence.
        position: Of the token that it follows, from 0.
        blocks_run: Blocks that computed it; drafts of speculation are told of too.
        confidence: At each exit that the policy asked, in order; none at a fixed exit.
    """

    row: int
    position: int
    blocks_run: int
    confidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class DraftChecked:
    """The full model checked a draft of speculation.

    Attributes:
        row: Which sequence.
        drafted: Tokens that were proposed.
        accepted: Those of them that it took.
    """

    row: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class ShadowCheck:
    """A token that was chosen for a shadow check, and what came of it.

    Attributes:
        row: Which sequence.
        position: Of the token that it follows, from 0.
        blocks_run: Blocks that computed it; all of them: it agrees, and nothing was computed.
        agrees: Whether its exit's likeliest token is the full model's.
    """

    row: int
    position: int
    blocks_run: int
    agrees: bool


Event = ExitTaken | DraftChecked | ShadowCheck
Listener = Callable[[Event], None]
