"""Engines that keep one block or head loaded at a time, for building and verifying large models.

Every token then opens each of them again: right for a few passes, never for serving.
"""

from __future__ import annotations

from collections.abc import Sequence

from ojfa_export.backends.backend import Cache, Engines, Float32, Hidden, Int32
from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.families.spec import ModelSpec
from ojfa_export.heap import trim_heap

# Models whose blocks and head take less in fp32 stay loaded: opening them again would take
# longer than the memory is worth.
LARGE_BYTES = 500_000_000


def is_large(spec: ModelSpec) -> bool:
    """Whether a model's blocks and head take more than LARGE_BYTES in fp32."""
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    mlp = spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
    head = spec.hidden_size * spec.vocab_size
    return 4 * (spec.blocks * (attention + mlp) + head) > LARGE_BYTES


def frugal(engines: Engines, spec: ModelSpec) -> Engines:
    """The engines, keeping one block or head loaded at a time where the model is large."""
    return FrugalEngines(engines) if is_large(spec) else engines


class FrugalEngines(ChoosesOnHost):
    """Engines that close each block and head after it has run."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def load_blocks(self, depth: int) -> None:
        """Loads nothing ahead."""

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """Makes a cache for this many sequences of at most this many tokens."""
        return FrugalCache(self._engines.new_cache(batch_size, capacity))

    def logits(self, hidden: Hidden, blocks_run: int) -> Float32:
        """Applies the model's own head, or the exit head: [rows, H] to [rows, V]."""
        logits = self._engines.logits(hidden, blocks_run)
        self._engines.unload_heads()
        trim_heap()
        return logits

    def unload_heads(self) -> None:
        """Nothing is left to close."""


class FrugalCache:
    """A cache that closes each block after it has run; keys and values stay."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.arrays = cache.arrays

    def embed(self, token_ids: Int32, starts: Sequence[int]) -> Hidden:
        """See `Cache`."""
        return self._cache.embed(token_ids, starts)

    def run_blocks(
        self,
        blocks: range,
        hidden: Hidden,
        rows: slice,
        starts: Sequence[int],
        *,
        long_context: bool,
    ) -> Hidden:
        """See `Cache`."""
        for block in blocks:
            one = range(block, block + 1)
            hidden = self._cache.run_blocks(one, hidden, rows, starts, long_context=long_context)
            self._cache.unload(block)
            trim_heap()
        return hidden

    def keep(self, kept: Hidden, rows: slice, starts: Sequence[int], hidden: Hidden) -> None:
        """See `Cache`."""
        self._cache.keep(kept, rows, starts, hidden)

    def unload(self, block: int) -> None:
        """Nothing is left to close."""
