"""Engines that keep one block or head loaded at a time, for building and verifying large models.

Every token then opens each of them again: right for a few passes, never for serving.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from ojfa_export.backends.backend import Engines, Executor
from ojfa_export.backends.checks import checking
from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.exit_blocks import ExitBlocks, ExitExecutor
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Float32, Hidden, Tokens
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.heap import trim_heap

# Models whose blocks and head take less in fp32 stay loaded: opening them again would take
# longer than the memory is worth. Builds time them whole, which takes as much.
LARGE_BYTES = 1_000_000_000


def weight_bytes(spec: ModelSpec) -> int:
    """What a model's blocks and head take in fp32."""
    attention = spec.hidden_size * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    mlp = spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
    head = spec.hidden_size * spec.vocab_size
    return 4 * (spec.blocks * (attention + mlp) + head)


def is_large(spec: ModelSpec) -> bool:
    """Whether a model's blocks and head take more than LARGE_BYTES in fp32."""
    return weight_bytes(spec) > LARGE_BYTES


def frugal(engines: Engines, spec: ModelSpec) -> Engines:
    """The engines, keeping one block or head loaded at a time where the model is large."""
    return FrugalEngines(engines) if is_large(spec) else engines


def close_all(engines: Engines, spec: ModelSpec) -> None:
    """Closes all blocks and heads; each is opened again when it is used.

    Args:
        engines: Engines that no session runs on now.
        spec: Their model.
    """
    gc.collect()  # sessions that nobody holds refer to themselves, and hold blocks
    executor = engines.executor(1, 1)
    for block in range(spec.blocks):
        executor.unload(block)
    if engines.exit_blocks is not None:
        behind = engines.exit_blocks.executor(1, 1)
        for exit in engines.exit_blocks.exits:
            behind.unload(exit)
    engines.unload_heads()
    trim_heap()


class FrugalEngines(ChoosesOnHost):
    """Engines that close each block and head after it has run.

    Args:
        engines: The engines.
        keep_heads: Whether heads stay open, for many calls between which blocks run.
    """

    def __init__(self, engines: Engines, *, keep_heads: bool = False) -> None:
        self._engines, self._keep_heads = engines, keep_heads
        blocks = engines.exit_blocks
        self.exit_blocks = None if blocks is None else FrugalExitBlocks(blocks)

    def load_blocks(self, depth: int) -> None:
        """Loads nothing ahead."""

    def executor(self, slots: int, capacity: int) -> Executor:
        """Makes a KV cache for this many sequences of at most this many tokens, and its passes."""
        return FrugalExecutor(self._engines.executor(slots, capacity))

    def logits(self, hidden: Hidden, blocks_run: int) -> Float32:
        """Applies the model's own head, or the exit head: [rows, H] to [rows, V]."""
        logits = self._engines.logits(hidden, blocks_run)
        if not self._keep_heads:
            self.unload_heads()
        return logits

    @property
    def has_check_head(self) -> bool:
        """Whether exits are checked by a head of their own."""
        return checking(self._engines) is not None

    def check_logits(self, hidden: Hidden, blocks_run: int | Sequence[int]) -> Float32:
        """Applies the check head: [rows, H] to [rows, n]."""
        checks = checking(self._engines)
        assert checks is not None
        logits = checks.check_logits(hidden, blocks_run)
        self._engines.unload_heads()
        trim_heap()
        return logits

    def unload_heads(self) -> None:
        """Closes both heads, where they stayed open."""
        self._engines.unload_heads()
        trim_heap()


class FrugalExecutor:
    """An executor that closes each block after it has run; keys and values stay."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.arrays = executor.arrays

    def embed(self, tokens: Tokens, chunks: Sequence[Chunk]) -> Hidden:
        """See `Executor`."""
        return self._executor.embed(tokens, chunks)

    def run(
        self, blocks: range, hidden: Hidden, chunks: Sequence[Chunk], *, long_context: bool
    ) -> Hidden:
        """See `Executor`."""
        for block in blocks:
            one = range(block, block + 1)
            hidden = self._executor.run(one, hidden, chunks, long_context=long_context)
            self._executor.unload(block)
            trim_heap()
        return hidden

    def new_states(self) -> Hidden:
        """See `Executor`."""
        return self._executor.new_states()

    def store(self, states: Hidden, chunks: Sequence[Chunk], hidden: Hidden) -> None:
        """See `Executor`."""
        self._executor.store(states, chunks, hidden)

    def load(self, states: Hidden, chunks: Sequence[Chunk]) -> Hidden:
        """See `Executor`."""
        return self._executor.load(states, chunks)

    def unload(self, block: int) -> None:
        """Nothing is left to close."""

    def release(self, slot: int) -> None:
        """See `Executor`."""
        self._executor.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `Executor`."""
        self._executor.copy_prefix(source, target, count)


class FrugalExitBlocks:
    """Blocks behind exits that are closed after they have run.

    Args:
        blocks: The opened blocks.

    Attributes:
        exits: See `ExitBlocks`.
        token_bytes: See `ExitBlocks`.
    """

    def __init__(self, blocks: ExitBlocks) -> None:
        self._blocks = blocks
        self.exits, self.token_bytes = blocks.exits, blocks.token_bytes

    def executor(self, slots: int, capacity: int, pages: int | None = None) -> ExitExecutor:
        """See `ExitBlocks`."""
        return FrugalExitExecutor(self._blocks.executor(slots, capacity, pages))


class FrugalExitExecutor:
    """An executor of exits' blocks that closes each after it has run; keys and values stay."""

    def __init__(self, executor: ExitExecutor) -> None:
        self._executor = executor

    def run(
        self, exit: int, hidden: Hidden, chunks: Sequence[Chunk], *, long_context: bool
    ) -> Hidden:
        """See `ExitExecutor`."""
        hidden = self._executor.run(exit, hidden, chunks, long_context=long_context)
        self._executor.unload(exit)
        trim_heap()
        return hidden

    def unload(self, exit: int) -> None:
        """Nothing is left to close."""

    def release(self, slot: int) -> None:
        """See `ExitExecutor`."""
        self._executor.release(slot)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `ExitExecutor`."""
        self._executor.copy_prefix(source, target, count)
