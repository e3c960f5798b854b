"""Fits narrow jumps in closed form: reduced-rank regression on streamed moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.errors import CalibrationError, UsageError
from ojfa_export.shortcuts.moments import Moments
from ojfa_export.shortcuts.regression import EPS32, EPS64, whitening_matrix

# Below this share of the constant's norm outside the kept directions, `shift` needs entries so
# large (about its inverse, in standard deviations of h) that their rounding to fp32 costs more than
# 1e-6 of the loss.
_SMALLEST_INTERCEPT_MARGIN = 1e-4


def rows_needed(hidden_size: int) -> int:
    """The fewest calibration rows that a fit accepts: 2 H.

    Least squares on n rows and H inputs inflates the error on new text by about n / (n - H):
    at n = 2 H it doubles, and below that the fit mostly memorises its rows.
    """
    return 2 * hidden_size


def fit_n_njtc(moments: Moments, rank: int, *, fitted_at: int, eps: float = 1e-5) -> Shortcut:
    """The N-NJTC jump (arXiv 2409.14091) of least mean squared error, exactly.

    Minimises E ||y - A B BatchNorm(h)||^2 over A [H, r], B [r, H] and BatchNorm's affine
    parameters, its statistics being the calibration data's. With n = (h - mean) / sqrt(var + eps)
    and a free shift this is the regression of y on [n, 1] under a rank constraint (Izenman,
    "Reduced-rank regression for the multivariate linear model", 1975): let F = [n, 1] W be the
    ordinary least-squares fit; `up` holds the r leading eigenvectors of E F^T F, and
    [down; o] = W up^T. The offset o is then expressed as a shift t of n with t @ down = o.

    No ridge. Directions of n whose variance is below fp32's epsilon times the mean variance of a
    feature are left out instead: in the fp32 hidden states of a running model they are rounding.
    Features that do not vary at all get scale 0. A feature with scale 0 and shift 1 is a constant
    1, which holds the offset without loss, so where there is one it is used for that. Where there
    is none and no t of moderate size exists (the fit's mean is a direction that h barely moves),
    the feature that costs least is given up for it.

    Args:
        moments: Of h (as x) and of the last block's output (as y).
        rank: r, 1..H.
        fitted_at: Blocks run before h.
        eps: BatchNorm's, added to the variances.

    Raises:
        UsageError: The rank is outside 1..H.
        CalibrationError: Too few rows, moments that are not finite, or hidden states that are
            all alike.
    """
    _check(moments, rank, fitted_at)
    variance = np.diagonal(moments.xx) / moments.count
    varies = variance > (EPS32 * moments.mean_x) ** 2
    fit = _regress(moments, rank, varies, eps, fitted_at)
    constant: int | None = None
    if not varies.all():
        constant = int(np.argmin(varies))
    elif fit.intercept_margin < _SMALLEST_INTERCEPT_MARGIN:
        constant = int(np.argmin(fit.cost_of_feature))
        varies[constant] = False
        fit = _regress(moments, rank, varies, eps, fitted_at)

    scale = np.where(varies, 1 / np.sqrt(variance + eps), 0).astype(np.float32)
    shift = -moments.mean_x * scale
    if constant is None:
        shift += fit.offset @ np.linalg.pinv(fit.down)
    else:
        shift[constant] = 1
        fit.down[constant] = fit.offset
    return Shortcut(
        scale=scale,
        shift=shift.astype(np.float32),
        down=fit.down.astype(np.float32),
        up=fit.up.astype(np.float32),
        kind="n-njtc",
        fitted_at=fitted_at,
    )


def fit_levels(
    moments_by_level: Iterable[Moments], rank: int, *, eps: float = 1e-5
) -> list[Shortcut]:
    """One N-NJTC jump for every exit: the multi-jump shortcut.

    Args:
        moments_by_level: For exits 1, 2, ... in order. A generator keeps one level's moments in
            memory at a time.
        rank: r, 1..H.
        eps: BatchNorm's.

    Raises:
        UsageError: The rank is outside 1..H.
        CalibrationError: As `fit_n_njtc`.
    """
    return [
        fit_n_njtc(moments, rank, fitted_at=level, eps=eps)
        for level, moments in enumerate(moments_by_level, start=1)
    ]


def training_loss(moments: Moments, shortcut: Shortcut) -> float:
    """The squared error ||y - shortcut(x)||^2 summed over H, its mean over the rows, in float64."""
    scale = shortcut.scale.astype(np.float64)
    down, up = shortcut.down.astype(np.float64), shortcut.up.astype(np.float64)
    jump = (scale[:, None] * down) @ up
    if shortcut.residual:
        jump[np.diag_indices_from(jump)] += 1
    bias = (shortcut.shift.astype(np.float64) @ down) @ up
    centred = moments.yy.sum() + np.vdot(jump, moments.xx @ jump - 2 * moments.xy)
    mean_error = moments.mean_y - moments.mean_x @ jump - bias
    return float(centred / moments.count + mean_error @ mean_error)


class _Regression(NamedTuple):
    """The rank-r regression of y on [n, 1]: y = (n @ down + offset) @ up."""

    down: NDArray[np.float64]  # [H, r], rows of features that are left out are 0
    offset: NDArray[np.float64]  # [r]
    up: NDArray[np.float64]  # [r, H], orthonormal rows
    # Norm of the part of the constant 1 that lies outside the span of the r predictors: 0 means
    # that one of them is the constant itself, which no shift of n can make.
    intercept_margin: float
    cost_of_feature: NDArray[np.float64]  # [H], the loss added by leaving it out, up at rest


def _regress(
    moments: Moments, rank: int, used: NDArray[np.bool_], eps: float, fitted_at: int
) -> _Regression:
    hidden = moments.hidden_size
    std = np.sqrt(np.diagonal(moments.xx)[used] / moments.count + eps)
    covariance = moments.xx[np.ix_(used, used)] / (moments.count * np.outer(std, std))
    cross = moments.xy[used] / (moments.count * std[:, None])

    whitener = whitening_matrix(covariance)
    if whitener.shape[1] == 0:
        raise CalibrationError(
            f"The hidden states after block {fitted_at} are the same for all "
            f"{moments.count} calibration tokens.",
            hint="Calibrate with real text, and check that the checkpoint's weights are trained.",
        )
    whitened_cross = whitener.T @ cross
    second_moment = whitened_cross.T @ whitened_cross + np.outer(moments.mean_y, moments.mean_y)
    values, vectors = np.linalg.eigh(second_moment)
    values, up = values[::-1][:rank], vectors[:, ::-1][:, :rank].T
    # LAPACK leaves the signs open; fixing them makes files comparable across machines.
    leading = up[np.arange(rank), np.abs(up).argmax(axis=1)]
    up = up * np.sign(leading)[:, None]

    # Where the fit itself has fewer than r directions, the others are noise: they map to 0.
    present = values > values[0] * hidden * EPS64
    down = np.zeros((hidden, rank))
    down[used] = whitener @ (whitened_cross @ up.T) * present
    offset = (up @ moments.mean_y) * present
    margin = 1 - float((offset[present] ** 2 / values[present]).sum())
    # A feature's variance given the others is 1 / (C^-1)_jj.
    precision = np.maximum((whitener**2).sum(axis=1), EPS64)
    cost = np.zeros(hidden)
    cost[used] = (down[used] ** 2).sum(axis=1) / precision
    cost[~used] = np.inf
    return _Regression(down, offset, up, float(np.sqrt(max(margin, 0.0))), cost)


def _check(moments: Moments, rank: int, fitted_at: int) -> None:
    hidden = moments.hidden_size
    if not 1 <= rank <= hidden:
        raise UsageError(
            f"Rank {rank} is outside 1..{hidden}, the model's hidden size.",
            hint=f"Choose a rank from 1 to {hidden}; the paper's is {max(1, hidden // 100)}.",
        )
    needed = rows_needed(hidden)
    if moments.count < needed:
        raise CalibrationError(
            f"The calibration text has {moments.count} tokens to fit on, fewer than the {needed} "
            f"that a hidden size of {hidden} needs.",
            hint="Give more or longer calibration text.",
        )
    finite = (np.isfinite(a).all() for a in (moments.xx, moments.xy, moments.yy))
    if not all(finite):
        raise CalibrationError(
            f"The hidden states after block {fitted_at} or the last one hold NaN or infinity.",
            hint="Check the checkpoint's weights; an fp16 one may need to run in fp32.",
        )
