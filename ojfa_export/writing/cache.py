"""Keys and values of a model that writes, in buffers of their full length.

transformers' own cache is copied for every token, which with long text costs more than the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class _Buffers(DynamicLayer):  # type: ignore[misc]  # the package has no types
    """One block's keys and values.

    Args:
        length: Tokens that there will be at most.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length, self._filled = length, 0
        self._buffers: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, heads, T, D], and gives back all that there are."""
        new = key_states, value_states
        if not self._buffers:
            self.lazy_initialization(*new)
            self._buffers = tuple(
                each.new_empty(*each.shape[:2], self._length, each.shape[3]) for each in new
            )
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        for buffer, each in zip(self._buffers, new, strict=True):
            buffer[:, :, start : self._filled] = each
        self.keys, self.values = (buffer[:, :, : self._filled] for buffer in self._buffers)
        return self.keys, self.values


def empty_cache(config: Any, length: int) -> Any:
    """A cache for a model of transformers.

    Args:
        config: The model's.
        length: Tokens that there will be at most.
    """
    cache = DynamicCache(config=config)
    cache.layers = [  # those of a sliding window hold no more than the window
        _Buffers(length) if type(each) is DynamicLayer else each for each in cache.layers
    ]
    return cache
