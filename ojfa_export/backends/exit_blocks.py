"""Blocks that stand behind exits, as `Engines` have them (`bundle.block_shortcut`).

A block jump takes an exit's hidden states through a block to what the model's own head takes. The
block has keys and values of its own at every exit, so that it must have run an exit's states of all
tokens before the one that is asked about: `runtime.exit_runner` sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Hidden


class ExitExecutor(Protocol):
    """Runs exits' blocks for the sequences of one cache, beside the model's executor.

    Keys and values are each exit's own, and take memory once the exit is asked. Dropping tokens is
    a matter of the caller's marks alone, as in `Executor`.
    """

    def run(
        self, exit: int, hidden: Hidden, chunks: Sequence[Chunk], *, long_context: bool
    ) -> Hidden:
        """Runs an exit's block on tokens that are new to it.

        Args:
            exit: Which.
            hidden: [tokens, H] after so many blocks of the model.
            chunks: Whose tokens they are; each slot at most once, and none after its tokens before.
            long_context: Whether LongRoPE's long factors apply.

        Returns:
            [tokens, H] for the model's own head; valid until the next call.
        """
        ...

    def unload(self, exit: int) -> None:
        """Closes an exit's engine; its keys and values stay, and it is opened again when used."""
        ...

    def release(self, slot: int) -> None:
        """Gives memory of a slot back whose sequence has ended."""
        ...

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies the keys and values of a slot's first tokens to another, at every exit."""
        ...


class ExitBlocks(Protocol):
    """The opened blocks of a block jump.

    Attributes:
        exits: That they serve, rising.
        token_bytes: Keys and values of a token at one exit.
    """

    exits: tuple[int, ...]
    token_bytes: int

    def executor(self, slots: int, capacity: int, pages: int | None = None) -> ExitExecutor:
        """Makes caches for this many sequences of at most this many tokens.

        Args:
            slots: Sequences.
            capacity: Tokens of each at most.
            pages: That the model's cache has for all of them, if it has pages: no exit of theirs
                needs more.
        """
        ...
