"""The kinds of shortcut, all seen alike: a map from a block's output to the last block's.

Sources: identity and JTC, Din et al., "Jump to Conclusions" (arXiv 2303.09435); NJTC and N-NJTC,
"Normalized Narrow Jump To Conclusions" (arXiv 2409.14091); OJFA, "One Jump Is All You Need"
(arXiv 2504.13984). The shared residual jump is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ojfa_export.shortcuts.moments import Moments
from ojfa_export.shortcuts.regression import whitening_matrix

Kind = Literal[
    "identity",
    "jtc",
    "njtc",
    "n-njtc",
    "ojfa",
    "ojfa-cosine",
    "mixed",
    "residual-closed-form",
    "residual",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Those that one exit head in a bundle can hold.
Shipped = Literal["ojfa", "residual"]
SHIPPED: tuple[Shipped, ...] = get_args(Shipped)

TITLES: dict[Kind, str] = {
    "identity": "identity: no jump",
    "jtc": "JTC: a full linear map per exit",
    "njtc": "NJTC: a narrow jump per exit",
    "n-njtc": "N-NJTC: a narrow jump with norm per exit (multi-jump)",
    "ojfa": "OJFA: one narrow jump, its level measured",
    "ojfa-cosine": "OJFA: one narrow jump, its level by cosine similarity",
    "mixed": "one narrow jump fitted on all levels mixed",
    "residual-closed-form": "shared residual jump, gates, closed form",
    "residual": "shared residual jump, gates, distilled",
}


class ExitMap(Protocol):
    """Predicts the last block's output from any exit's hidden states; a `Shortcut` is one."""

    @property
    def parameters(self) -> int:
        """Stored weights, for all exits together."""
        ...

    def apply(self, h: NDArray[Any], blocks_run: int | None = None, /) -> NDArray[Any]:
        """Hidden states [..., H] after this many blocks to the last block's output [..., H]."""
        ...


@dataclass(frozen=True)
class Identity:
    """y = h."""

    parameters: int = 0

    def apply(self, h: NDArray[Any], blocks_run: int | None = None, /) -> NDArray[Any]:
        """The hidden states as they are."""
        return h


@dataclass(frozen=True, eq=False)
class Linear:
    """y = h A, without a bias.

    Attributes:
        matrix: A, [H, H] fp32.
    """

    matrix: NDArray[np.float32]

    @property
    def parameters(self) -> int:
        """H^2."""
        return self.matrix.size

    def apply(self, h: NDArray[Any], blocks_run: int | None = None, /) -> NDArray[Any]:
        """See `ExitMap`."""
        y: NDArray[Any] = h @ self.matrix
        return y


@dataclass(frozen=True, eq=False)
class Narrow:
    """y = (h down) up, without a bias.

    Attributes:
        down: [H, r] fp32.
        up: [r, H] fp32.
    """

    down: NDArray[np.float32]
    up: NDArray[np.float32]

    @property
    def parameters(self) -> int:
        """2 H r."""
        return self.down.size + self.up.size

    def apply(self, h: NDArray[Any], blocks_run: int | None = None, /) -> NDArray[Any]:
        """See `ExitMap`."""
        y: NDArray[Any] = (h @ self.down) @ self.up
        return y


@dataclass(frozen=True, eq=False)
class PerExit:
    """A map of its own for every exit.

    Attributes:
        maps: For exits 1..L-1.
    """

    maps: Sequence[ExitMap]

    @property
    def parameters(self) -> int:
        """Of all maps."""
        return sum(each.parameters for each in self.maps)

    def apply(self, h: NDArray[Any], blocks_run: int | None = None, /) -> NDArray[Any]:
        """See `ExitMap`.

        Raises:
            ValueError: No exit that there is a map for.
        """
        if blocks_run is None or not 1 <= blocks_run <= len(self.maps):
            raise ValueError(f"no map for exit {blocks_run}, only for 1..{len(self.maps)}")
        return self.maps[blocks_run - 1].apply(h, blocks_run)


def fit_jtc(moments: Moments) -> Linear:
    """JTC's map: ordinary least squares of y on x, without a bias."""
    second, cross = _uncentred(moments)
    whitening = whitening_matrix(second)
    return Linear((whitening @ (whitening.T @ cross)).astype(np.float32))


def fit_njtc(moments: Moments, rank: int) -> Narrow:
    """NJTC's map of least mean squared error: reduced-rank regression without a bias.

    Args:
        moments: Of h (as x) and of the last block's output (as y).
        rank: r, 1..H.
    """
    second, cross = _uncentred(moments)
    whitening = whitening_matrix(second)
    left, values, right = np.linalg.svd(whitening.T @ cross, full_matrices=False)
    # Whitening leaves out directions without variance: the rank may be below the one asked for.
    kept = min(rank, values.size)
    down = np.zeros((moments.hidden_size, rank), np.float32)
    up = np.zeros((rank, moments.hidden_size), np.float32)
    down[:, :kept] = whitening @ (left[:, :kept] * values[:kept])
    up[:kept] = right[:kept]
    return Narrow(down, up)


def _uncentred(moments: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """E x^T x and E x^T y."""
    second = moments.xx / moments.count + np.outer(moments.mean_x, moments.mean_x)
    cross = moments.xy / moments.count + np.outer(moments.mean_x, moments.mean_y)
    return second, cross
