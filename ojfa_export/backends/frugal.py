"""Engines that keep one block or head loaded at a time, for building and verifying large models.

Every token then opens each of them again: right for a few passes, never for serving.
"""

from __future__ import annotations

from collections.abc import Sequence

from ojfa_export.backends.backend import Engines, Executor
from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.exit_blocks import ExitBlocks, ExitExecutor
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Float32, Hidden, Tokens
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.heap import trim_heap

# Models whose blocks and head take less in fp32 stay loaded: opening them again would take
# longer than the memory is worth.
LARGE_BYTES = 500_000_000


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


class FrugalEngines(ChoosesOnHost):
    """Engines that close each block and head after it has run."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
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
        self._engines.unload_heads()
        trim_heap()
        return logits

    def unload_heads(self) -> None:
        """Nothing is left to close."""


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

    def executor(self, slots: int, capacity: int) -> ExitExecutor:
        """See `ExitBlocks`."""
        return FrugalExitExecutor(self._blocks.executor(slots, capacity))


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
