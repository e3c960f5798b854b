"""Chooses the one jump that serves every exit, by measuring each jump at each exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.graphs.fold import fold
from ojfa_export.models.head import FinalNorm
from ojfa_export.shortcuts.kinds import Shipped
from ojfa_export.shortcuts.metrics import ExitQuality, FullModelReference, evaluate
from ojfa_export.shortcuts.narrow_tokens import NarrowTokens

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """Quality of each level's jump at each exit.

    All arrays are [L-1, L-1] float64, indexed [fitted_at - 1, used_at - 1]: a row is one jump
    used at every exit, the diagonal is a jump per exit (multi-jump).

    Attributes:
        precision_at_1: See `ExitQuality`, as the others.
        precision_at_5: 0..1.
        precision_at_10: 0..1.
        surprisal: Nats.
    """

    precision_at_1: NDArray[np.float64]
    precision_at_5: NDArray[np.float64]
    precision_at_10: NDArray[np.float64]
    surprisal: NDArray[np.float64]

    def quality(self, *, fitted_at: int, used_at: int) -> ExitQuality:
        """The jump fitted after `fitted_at` blocks, used after `used_at` blocks."""
        cell = (fitted_at - 1, used_at - 1)
        return ExitQuality(
            precision_at_1=float(self.precision_at_1[cell]),
            precision_at_5=float(self.precision_at_5[cell]),
            precision_at_10=float(self.precision_at_10[cell]),
            surprisal=float(self.surprisal[cell]),
        )


@dataclass(frozen=True)
class Choice:
    """The level whose jump serves every exit, and why.

    Attributes:
        fitted_at: Blocks run, 1..L-1.
        reason: In words, with the numbers.
    """

    fitted_at: int
    reason: str


def transfer_matrix(
    shortcuts: Sequence[Shortcut],
    hidden_by_level: Sequence[NDArray[Any]],
    norm: FinalNorm,
    head_weight: NDArray[Any],
    head_bias: NDArray[Any] | None,
    reference: FullModelReference,
    progress: Progress | None = None,
) -> TransferMatrix:
    """Measures every level's jump at every exit on held-out tokens.

    Args:
        shortcuts: The narrow jumps of exits 1..L-1, in order.
        hidden_by_level: For exits 1..L-1, [n, H] held-out hidden states; memory maps will do.
        norm: The final norm.
        head_weight: [V, H] of the LM head.
        head_bias: [V], or None.
        reference: The full model's predictions for the same tokens.
        progress: Called with (cells measured, cells in all).

    Raises:
        ValueError: The numbers of shortcuts and of levels differ, or a shortcut is residual.
    """
    levels = len(shortcuts)
    if len(hidden_by_level) != levels:
        raise ValueError(f"{levels} shortcuts, but hidden states of {len(hidden_by_level)} levels")
    measures = np.empty((4, levels, levels))
    for row, shortcut in enumerate(shortcuts):
        likeliest = NarrowTokens(fold(shortcut, norm, head_weight, head_bias))
        for column, hidden in enumerate(hidden_by_level):
            quality = evaluate(likeliest, hidden, reference)
            measures[:, row, column] = (
                quality.precision_at_1,
                quality.precision_at_5,
                quality.precision_at_10,
                quality.surprisal,
            )
            if progress is not None:
                progress(row * levels + column + 1, levels * levels)
    return TransferMatrix(*measures)


def choose(matrix: TransferMatrix) -> Choice:
    """The level with the highest mean Precision@1 over all exits.

    Ties go to the lower mean surprisal, then to the lower level. The paper's own criterion, a
    similarity between jumps, is not used: the matrix measures what it stands for.
    """
    precision = matrix.precision_at_1.mean(axis=1)
    surprisal = matrix.surprisal.mean(axis=1)
    levels = precision.size
    best = min(range(levels), key=lambda i: (-precision[i], surprisal[i], i))
    multi_jump = float(np.diagonal(matrix.precision_at_1).mean())
    reason = (
        f"The jump fitted after block {best + 1} predicts the full model's next token for "
        f"{precision[best]:.1%} of held-out tokens, averaged over all {levels} exits "
        f"(mean surprisal {surprisal[best]:.2f} nats)"
    )
    if levels > 1:
        worst = int(precision.argmin())
        reason += (
            f": the best of {levels} levels. An arbitrary level reaches {precision.mean():.1%} on "
            f"average and {precision[worst]:.1%} at worst (block {worst + 1})"
        )
    gap = 100 * (float(precision[best]) - multi_jump)
    direction = "more" if gap > 0 else "less"
    reason += (
        f". A separate jump for every exit reaches {multi_jump:.1%}: the one jump has "
        f"{abs(gap):.1f} percentage points {direction}, for 1/{levels} of the parameters."
    )
    return Choice(best + 1, reason)


def choose_kind(
    asked: Shipped | None,
    narrow: Sequence[ExitQuality],
    residual: Sequence[ExitQuality],
    one_jump: Shortcut,
    distilled: Shortcut,
    head_shape: tuple[int, ...],
) -> tuple[Shipped, str]:
    """The kind of the one jump that ships: of two with the same rank, the better.

    Better is a higher mean Precision@1 over the exits; ties go to the lower mean surprisal.
    Quality comes first, but the price of a check is said: a residual jump needs the whole LM head.

    Args:
        asked: What a user asked for, which is then taken; None for the better.
        narrow: Quality of the one narrow jump at every exit.
        residual: Quality of the shared residual jump.
        one_jump: The narrow jump.
        distilled: The residual jump.
        head_shape: [V, H] of the LM head.

    Returns:
        The kind, and the reason in words, with the numbers.
    """

    def score(exits: Sequence[ExitQuality]) -> tuple[float, float]:
        precision = float(np.mean([each.precision_at_1 for each in exits]))
        return precision, -float(np.mean([each.surprisal for each in exits]))

    kind: Shipped = asked or ("residual" if score(residual) > score(narrow) else "ojfa")
    vocabulary, hidden = head_shape
    folded = one_jump.rank * (vocabulary + hidden + 1)
    whole = vocabulary * hidden + 2 * hidden * distilled.rank
    (narrow_precision, narrow_surprisal), (precision, surprisal) = score(narrow), score(residual)
    return kind, (
        f"One shared residual jump of the same rank, with a gate for each exit, reaches "
        f"{precision:.1%} ({-surprisal:.2f} nats) where the narrow one reaches "
        f"{narrow_precision:.1%} ({-narrow_surprisal:.2f} nats) on the exits' own sample. "
        f"{'Asked for' if asked else 'Chosen'}: {kind}. A check of an exit reads {whole:,} weights "
        f"with the residual jump and {folded:,} with the narrow one, which is folded into the head."
    )
