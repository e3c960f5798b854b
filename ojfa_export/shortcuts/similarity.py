"""A level for the one jump, chosen by how alike the jumps are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut


def cosine_similarity(shortcuts: Sequence[Shortcut]) -> NDArray[np.float64]:
    """Cosines between the jumps' linear maps: of P = down @ up, <P, Q> / (|P| |Q|) (Frobenius).

    P acts on the normalised hidden state, so that how large hidden states are at a level plays no
    part. Only [r, r] products are formed: <D U, E V> = <D^T E, U V^T>.

    Returns:
        [n, n], 1 on the diagonal; 0 for a jump that maps all to 0.
    """
    maps = [(each.down.astype(np.float64), each.up.astype(np.float64)) for each in shortcuts]
    inner = np.array([[np.vdot(d.T @ e, u @ v.T) for e, v in maps] for d, u in maps])
    norms = np.sqrt(np.maximum(np.diagonal(inner), 0))
    products = np.outer(norms, norms)
    cosines: NDArray[np.float64] = inner / np.where(products > 0, products, 1)
    return cosines


def most_similar_level(shortcuts: Sequence[Shortcut]) -> int:
    """The level (blocks run, 1..n) whose jump is most like all others, by mean cosine.

    The paper (arXiv 2504.13984) chooses the one jump by a similarity between jumps; which one could
    not be established. This criterion is ours.
    """
    return int(cosine_similarity(shortcuts).mean(axis=1).argmax()) + 1
