"""The shared residual jump, y = h + g_k D(BN(h)): one low-rank map, one gate for each exit k.

Late exits want the identity, which no narrow jump is near; early ones want a correction in the
same few directions, only larger. Gate 0 is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.errors import CalibrationError
from ojfa_export.shortcuts.regression import whitening_matrix

# The loss changes by less than a thousandth after these.
ROUNDS = 3
_BATCH_NORM_EPS = 1e-5

HiddenByDepth = Callable[[int], NDArray[Any]]
Float64 = NDArray[np.float64]


def fit_residual(
    hidden: HiddenByDepth, blocks: int, rows: NDArray[np.integer[Any]], rank: int
) -> Shortcut:
    """The shared residual jump of least squared error over all exits, by alternating least squares.

    With n = (h - mean) / sqrt(var + eps) over all exits' hidden states, minimises the sum over
    exits k of E ||y - h_k - g_k [n_k, 1] B||^2 over B of rank r and the gates g. Given the gates
    this is a reduced-rank regression on the sums of the exits' moments, given B each gate is a
    one-dimensional least squares; both are exact, so the loss never rises. One level's hidden
    states are in memory at a time.

    Args:
        hidden: [n, H] hidden states at depths 1..L, all of the same tokens; memory maps will do.
        blocks: L, at least 2.
        rows: Those to fit on.
        rank: r, 1..H.

    Raises:
        CalibrationError: Hidden states that are all alike.
    """
    levels = range(1, blocks)
    target = np.asarray(hidden(blocks)[rows], np.float64)
    mean, deviation = _pooled_statistics(hidden, levels, rows)

    def normed(level: int) -> tuple[Float64, Float64]:
        h = np.asarray(hidden(level)[rows], np.float64)
        return np.column_stack([(h - mean) / deviation, np.ones(len(h))]), target - h

    gates = np.ones(len(levels))
    down = up = None
    for _ in range(ROUNDS):
        second, cross = np.zeros((len(mean) + 1,) * 2), np.zeros((len(mean) + 1, len(mean)))
        for index, level in enumerate(levels):
            inputs, wanted = normed(level)
            own_second, own_cross = inputs.T @ inputs / len(rows), inputs.T @ wanted / len(rows)
            if down is None or up is None:
                gates[index] = _first_gate(own_second, own_cross)
            else:
                gates[index] = _gate(inputs @ down, wanted, up)
            second += gates[index] ** 2 * own_second
            cross += gates[index] * own_cross
        down, up = _regress(second, cross, rank)
    assert down is not None and up is not None  # noqa: PT018 - ROUNDS is positive
    for index, level in enumerate(levels):
        inputs, wanted = normed(level)
        gates[index] = _gate(inputs @ down, wanted, up)

    size = np.abs(gates).mean() or 1.0  # gates are about 1, so that files are easy to read
    gates, up = gates / size, up * size
    offset, down = down[-1], down[:-1]
    return Shortcut(
        scale=(1 / deviation).astype(np.float32),
        shift=(offset @ np.linalg.pinv(down) - mean / deviation).astype(np.float32),
        down=down.astype(np.float32),
        up=up.astype(np.float32),
        kind="residual-closed-form",
        fitted_at=1,
        residual=True,
        gates=gates.astype(np.float32),
    )


def _pooled_statistics(
    hidden: HiddenByDepth, levels: range, rows: NDArray[np.integer[Any]]
) -> tuple[Float64, Float64]:
    """Mean and deviation [H] over the hidden states of all levels."""
    means, squares = [], []
    for level in levels:
        h = np.asarray(hidden(level)[rows], np.float64)
        means.append(h.mean(axis=0))
        squares.append(h.var(axis=0))
    mean = np.mean(means, axis=0)
    variance = np.mean(squares, axis=0) + np.var(means, axis=0)
    if not variance.any():
        raise CalibrationError(
            f"The hidden states after every block are the same for all {len(rows)} calibration "
            "tokens.",
            hint="Calibrate with real text, and check that the checkpoint's weights are trained.",
        )
    return mean, np.sqrt(variance + _BATCH_NORM_EPS)


def _first_gate(second: Float64, cross: Float64) -> float:
    """Before there is a map: the ratio of what is wanted to what goes in.

    That is the norm of pinv(second) @ cross, which multiplying by eigenvectors leaves as it is.
    """
    values, vectors = np.linalg.eigh(second)
    kept = np.abs(values) > np.abs(values).max() * len(values) * np.finfo(np.float64).eps
    return float(np.linalg.norm((vectors[:, kept] / values[kept]).T @ cross))


def _gate(features: Float64, wanted: Float64, up: Float64) -> float:
    """The gate of least squared error of one level, given the map.

    Args:
        features: [n, r], the inputs through `down`.
        wanted: [n, H].
        up: [r, H].
    """
    predicted = np.vdot(features.T @ features, up @ up.T)
    return float(np.vdot(features.T @ wanted, up) / predicted) if predicted > 0 else 0.0


def _regress(second: Float64, cross: Float64, rank: int) -> tuple[Float64, Float64]:
    """Reduced-rank regression from second moments: `down` [H+1, r] and `up` [r, H].

    Each of the r features has mean square 1 over the (gated) rows.
    """
    whitener = whitening_matrix(second)
    left, values, right = np.linalg.svd(whitener.T @ cross, full_matrices=False)
    kept = min(rank, values.size)
    down, up = np.zeros((len(second), rank)), np.zeros((rank, cross.shape[1]))
    down[:, :kept] = whitener @ left[:, :kept]
    up[:kept] = values[:kept, None] * right[:kept]
    return down, up
