"""A narrow jump trained by gradient descent, as the paper does: to compare with. Needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.shortcut import Shortcut

EPOCHS = 30
BATCH = 512
LEARNING_RATE = 3e-3
_EPS = 1e-5


def descend_n_njtc(
    x: NDArray[Any],
    y: NDArray[Any],
    rank: int,
    *,
    fitted_at: int,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
) -> Shortcut:
    """An N-NJTC jump trained with Adam on the mean squared error, batch norm in training mode.

    y = A B BatchNorm(h) with learned scale and shift (arXiv 2409.14091); the rate falls to 0 along
    a cosine. At the end batch norm's running statistics are replaced by those of all rows, which
    is what they estimate.

    Args:
        x: [n, H] hidden states.
        y: [n, H] the last block's output.
        rank: r, 1..H.
        fitted_at: Blocks run before x.
        epochs: Passes over the rows.
        learning_rate: Adam's first.
    """
    import torch

    torch.manual_seed(0)
    inputs, target = (torch.tensor(np.asarray(each, np.float32)) for each in (x, y))
    count, hidden = inputs.shape
    norm = torch.nn.BatchNorm1d(hidden, eps=_EPS)
    down = torch.nn.Linear(hidden, rank, bias=False)
    up = torch.nn.Linear(rank, hidden, bias=False)
    model = torch.nn.Sequential(norm, down, up)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    batches = max(1, count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for _ in range(epochs):
        for part in torch.randperm(count).tensor_split(batches):
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(model(inputs[part]), target[part]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        rows = inputs.double()
        scale = norm.weight / torch.sqrt(rows.var(dim=0, unbiased=False) + _EPS)
        shift = norm.bias - rows.mean(dim=0) * scale
    return Shortcut(
        scale=scale.float().numpy(),
        shift=shift.float().numpy(),
        down=down.weight.detach().T.contiguous().numpy(),
        up=up.weight.detach().T.contiguous().numpy(),
        kind="n-njtc",
        fitted_at=fitted_at,
    )
