from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from ojfa_export.shortcuts.moments import Moments

Rows = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def paired_rows(rng: np.random.Generator) -> Callable[..., Rows]:
    """Correlated rows x, and rows y that depend on them, with means and noise."""

    def orthogonal(hidden: int) -> np.ndarray:
        return np.linalg.qr(rng.normal(size=(hidden, hidden)))[0]

    def make(n: int, hidden: int) -> Rows:
        # Well conditioned, so that a shift of x can make any mean of y.
        mixing = orthogonal(hidden) * rng.uniform(0.3, 3, hidden)
        x = rng.normal(size=(n, hidden)) @ mixing + 5 * rng.normal(size=hidden)
        mean = 0.5 * rng.normal(size=hidden)
        y = (x - x.mean(axis=0)) @ orthogonal(hidden) + rng.normal(size=(n, hidden)) + mean
        return x, y

    return make


@pytest.fixture
def moments_of() -> Callable[..., Moments]:
    def make(x: np.ndarray, y: np.ndarray) -> Moments:
        moments = Moments(x.shape[1])
        moments.update(x, y)
        return moments

    return make
