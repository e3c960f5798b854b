"""How good a shortcut that is given is at every exit, beside no jump at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ojfa_export.bundle.shortcut_file import ExitShortcut
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.calibrate import tokens_of
from ojfa_export.shortcuts.hidden import HiddenStates
from ojfa_export.shortcuts.metrics import ExitQuality, FullModelReference, evaluate
from ojfa_export.shortcuts.sample import exit_sample
from ojfa_export.system.progress import Progress


@dataclass(frozen=True)
class Measured:
    """Qualities of a shortcut that was given.

    Attributes:
        shortcut: The shortcut.
        quality: For exits 1..L-1.
        identity: Quality of no jump at all.
        tokens: Held-out tokens behind the figures of an exit.
    """

    shortcut: ExitShortcut
    quality: list[ExitQuality]
    identity: list[ExitQuality]
    tokens: int


def measure(
    states: HiddenStates,
    blocks: int,
    shortcut: ExitShortcut,
    head: LanguageHead,
    scratch: Path,
    progress: Progress,
) -> Measured:
    """Measures a shortcut at every exit.

    Args:
        states: Hidden states of all depths, of held-out text.
        blocks: L.
        shortcut: Of any kind.
        head: The model's own norm and head.
        scratch: Folder for the full model's log-probabilities.
        progress: Shows exits.
    """
    sample = exit_sample(states, blocks, 0, head)
    reference = FullModelReference(sample.hidden(blocks), head, scratch)
    quality, identity = [], []
    with progress.task("calibrating: measuring exits", blocks - 1, "exits") as task:
        for depth in range(1, blocks):
            hidden = sample.hidden(depth)
            quality.append(evaluate(partial(tokens_of, shortcut, head, depth), hidden, reference))
            identity.append(evaluate(head.likeliest, hidden, reference))
            task.advance()
    return Measured(shortcut, quality, identity, len(sample.rows))
