"""Running the blocks behind exits: which states they need, and what each has seen of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.exit_blocks import ExitBlocks
from ojfa_export.backends.passes import Chunk, Newest, Pass, select_chunks
from ojfa_export.decoding.arrays import Hidden
from ojfa_export.runtime.sequence import Sequence


class ExitRunner:
    """Runs exits' blocks for the sequences of one KV cache.

    Which exits a sequence uses, and how many of its tokens each one's block has run, it says itself
    (`Sequence.exits`). Of an exit that it uses, the states of all tokens between that mark and the
    mark of the model's block before the exit are kept: passes are cut there. So an exit's block
    catches up in one pass when it is asked, like any block. Where an exit is asked for the first
    time of tokens that have run already, their states are computed again: that costs the blocks
    before the exit once, and keeping the states of exits that nobody asks would cost always.

    Args:
        blocks: The opened blocks.
        executor: Of the model.
        states: Gives where states after an exit are kept.
        slots: Sequences.
        capacity: Tokens that each may hold.
        pages: As of `ExitBlocks.executor`.
    """

    def __init__(
        self,
        blocks: ExitBlocks,
        executor: Executor,
        states: Callable[[int], Hidden],
        slots: int,
        capacity: int,
        pages: int | None = None,
    ) -> None:
        self._exits = frozenset(blocks.exits)
        self.executor = blocks.executor(slots, capacity, pages)
        self._model, self._states = executor, states

    def serves(self, depth: int) -> bool:
        """Whether there is a block behind a depth."""
        return depth in self._exits

    def begin(
        self, sequences: Many[Sequence], depths: Many[int], again: Callable[[Pass, int], None]
    ) -> None:
        """Has sequences use exits: from now on the states there are kept.

        Args:
            sequences: All before, or all beyond LongRoPE's switch.
            depths: To which each runs and is asked there.
            again: Runs a pass from the first block on and keeps what comes out of it at a depth;
                marks stay.
        """
        for depth in sorted(self._exits.intersection(depths)):
            new = [
                sequence
                for sequence, each in zip(sequences, depths, strict=True)
                if each == depth and depth not in sequence.exits
            ]
            late = [each for each in new if each.marks[depth - 1]]
            if late:
                chunks = tuple(Chunk(each.slot, 0, each.marks[depth - 1]) for each in late)
                tokens = [token for each in late for token in each.tokens[: each.marks[depth - 1]]]
                again(Pass(range(depth), chunks, late[0].long_context, tokens), depth)
            for each in new:
                each.exits[depth] = 0

    def cuts(self, step: Pass, sequences: Many[Sequence]) -> set[int]:
        """Depths inside a pass at which states are kept."""
        running = {chunk.slot for chunk in step.chunks}
        used = {exit for each in sequences if each.slot in running for exit in each.exits}
        return {exit for exit in used if step.blocks.start < exit < step.blocks.stop}

    def keep(self, depth: int, step: Pass, hidden: Hidden, sequences: Many[Sequence]) -> None:
        """Keeps states [tokens, H] of a pass after some blocks, of the sequences that need them."""
        using = {each.slot for each in sequences if depth in each.exits}
        chunks, rows = select_chunks(step.chunks, hidden, using)
        if chunks:
            self._model.store(self._states(depth), chunks, rows)

    def run(
        self, depth: int, sequences: Many[Sequence], stops: Many[int], newest: Newest
    ) -> tuple[tuple[Chunk, ...], Hidden]:
        """Runs an exit's block on all that it hasn't seen of sequences that have run to the exit.

        Args:
            depth: The exit.
            sequences: Each uses it; all before, or all beyond LongRoPE's switch.
            stops: One past the last token of each that counts.
            newest: The newest pass of the model.

        Returns:
            The tokens that ran, those of each sequence up to its stop, and what came out.
        """
        chunks = tuple(
            Chunk(each.slot, each.exits[depth], stop - each.exits[depth])
            for each, stop in zip(sequences, stops, strict=True)
        )
        if newest.depth == depth and newest.chunks == chunks:
            hidden = newest.hidden  # still where it was computed
        else:
            hidden = self._model.load(self._states(depth), chunks)
        long_context = sequences[0].long_context
        return chunks, self.executor.run(depth, hidden, chunks, long_context=long_context)
