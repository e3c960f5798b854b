"""How good a shortcut that is given is at every exit, beside no jump at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ojfa_export.bundle.block_shortcut import BlocksOnSequences
from ojfa_export.bundle.shortcut_file import ExitShortcut, RowShortcut, exits_of
from ojfa_export.models.head import LanguageHead
from ojfa_export.shortcuts.calibrate import tokens_of
from ojfa_export.shortcuts.hidden import HiddenStates
from ojfa_export.shortcuts.metrics import ExitQuality, FullModelReference, evaluate
from ojfa_export.shortcuts.sample import Sample, exit_sample
from ojfa_export.system.progress import Progress


@dataclass(frozen=True)
class Measured:
    """Qualities of a shortcut that was given.

    Attributes:
        shortcut: The shortcut.
        exits: That it serves.
        quality: At each of them.
        identity: Quality of no jump at all.
        tokens: Held-out tokens behind the figures of an exit.
    """

    shortcut: ExitShortcut
    exits: tuple[int, ...]
    quality: list[ExitQuality]
    identity: list[ExitQuality]
    tokens: int


def evaluate_shortcut(
    shortcut: RowShortcut | BlocksOnSequences,
    head: LanguageHead,
    depth: int,
    sample: Sample,
    reference: FullModelReference,
) -> ExitQuality:
    """A shortcut's quality at an exit, on the sample's tokens.

    A block jump is applied to the whole windows that they are in.
    """
    if isinstance(shortcut, BlocksOnSequences):
        return evaluate(head.likeliest, sample.mapped(depth, shortcut), reference)
    return evaluate(partial(tokens_of, shortcut, head, depth), sample.hidden(depth), reference)


def measure(
    states: HiddenStates,
    blocks: int,
    shortcut: RowShortcut | BlocksOnSequences,
    head: LanguageHead,
    scratch: Path,
    progress: Progress,
) -> Measured:
    """Measures a shortcut at every exit that it serves.

    Args:
        states: Hidden states of all depths, of held-out text.
        blocks: L.
        shortcut: Of any kind; a block jump as a map of windows of the text.
        head: The model's own norm and head.
        scratch: Folder for the full model's log-probabilities.
        progress: Shows exits.
    """
    sample = exit_sample(states, blocks, 0, head)
    reference = FullModelReference(sample.hidden(blocks), head, scratch)
    given = shortcut.shortcut if isinstance(shortcut, BlocksOnSequences) else shortcut
    exits, quality, identity = exits_of(given, blocks), [], []
    with progress.task("calibrating: measuring exits", len(exits), "exits") as task:
        for depth in exits:
            quality.append(evaluate_shortcut(shortcut, head, depth, sample, reference))
            identity.append(evaluate(head.likeliest, sample.hidden(depth), reference))
            task.advance()
    return Measured(given, exits, quality, identity, len(sample.rows))
