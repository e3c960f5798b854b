"""What the closed-form fits share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)


def whitening_matrix(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """K with K^T C K = 1 and K K^T = C's pseudo-inverse; [H, number of directions kept].

    Directions whose variance is below fp32's epsilon times the mean variance of a feature are
    left out: in the fp32 hidden states of a running model they are rounding.
    """
    if covariance.size == 0:
        return covariance
    values, vectors = np.linalg.eigh(covariance)
    smallest = max(EPS32 * values.mean(), values[-1] * values.size * EPS64)
    kept = values > smallest
    result: NDArray[np.float64] = vectors[:, kept] / np.sqrt(values[kept])
    return result
