"""Drafting with a draft layer: which positions it knows of each sequence, and chains of drafts."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.draft import Chains, DraftEngines, Drafts
from ojfa_export.backends.passes import Chunk, Pass, select_chunks
from ojfa_export.decoding.arrays import Hidden
from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.runtime.sequence import Sequence


class Drafter:
    """Runs a draft layer for the sequences of one KV cache that draft with it.

    What the model's blocks have run of such a sequence the layer knows by the watermarks: all
    passes keep the states of its tokens, so those of a position are there exactly where the block
    at the layer's last depth has run it. The layer's own mark says how many positions it has run
    on them; beyond, its cache has what a chain left, which is written over.

    Args:
        engines: The opened layer.
        arrays: Of the model's executor.
        slots: Sequences.
        capacity: Tokens that each may hold.
    """

    def __init__(self, engines: DraftEngines, arrays: Any, slots: int, capacity: int) -> None:
        self.engines, self._arrays = engines, arrays
        self.executor = engines.executor(slots, capacity)
        self._capacity = capacity
        self._chains = self.executor if isinstance(self.executor, Chains) else None

    @property
    def chains(self) -> bool:
        """Whether drafts need not be on the host before they are drafted from; see `chain`."""
        return self._chains is not None

    def room(self, sequences: Many[Sequence]) -> int:
        """How many drafts of each there is room for."""
        return min(min(self._capacity - len(each), each.room_before_switch) for each in sequences)

    def chain(self, sequences: Many[Sequence], most: int) -> Drafts | None:
        """Drafts what the layer thinks likeliest after each sequence's newest token.

        Args:
            sequences: Each `can_draft`, with room for one draft or more.
            most: Drafts of each; as many as all have room for.

        Returns:
            None of too many sequences.
        """
        assert self._chains is not None
        tokens, chunks = _new_positions(sequences)
        drafts = self._chains.chain(tokens, chunks, min(most, self.room(sequences)))
        if drafts is not None:
            _know(sequences)
        return drafts

    def check(self, executor: Executor, step: Pass, sequences: Many[Sequence]) -> HeadOutput | None:
        """Runs a whole pass through all blocks at once and asks the final head.

        Returns:
            What is likeliest after each token; None where it must be run by its parts.
        """
        if self._chains is None or not all(sequence.drafting for sequence in sequences):
            return None
        return self._chains.check(executor, step)

    def cuts(self, step: Pass, sequences: Many[Sequence]) -> set[int]:
        """Depths inside a pass at which states are kept; none where no sequence drafts."""
        blocks = step.blocks
        if not any(sequence.drafting for sequence in sequences):
            return set()
        return {depth for depth in self.engines.depths if blocks.start < depth < blocks.stop}

    def keep(self, depth: int, step: Pass, hidden: Hidden, sequences: Many[Sequence]) -> None:
        """Keeps hidden states [tokens, H] of a pass after some block, where the layer sees them."""
        if depth not in self.engines.depths:
            return
        drafting = {sequence.slot for sequence in sequences if sequence.drafting}
        chunks, hidden = select_chunks(step.chunks, hidden, drafting)
        if chunks:
            self.executor.keep(self.engines.depths.index(depth), chunks, hidden)

    def run(self, sequences: Many[Sequence]) -> Hidden:
        """What the layer says after each sequence's newest token, [sequences, H].

        Args:
            sequences: Each `can_draft`, or one token longer than when it was asked last.
        """
        begins = [sequence for sequence in sequences if sequence.can_draft]
        goes_on = [sequence for sequence in sequences if not sequence.can_draft]
        parts = []
        if begins:
            parts.append(self._begin(begins))
        if goes_on:
            parts.append(self._go_on(goes_on))
        hidden = parts[0] if len(parts) == 1 else self._arrays.concatenate(parts)
        for row, sequence in enumerate((*begins, *goes_on)):
            assert sequence.drafting is not None
            sequence.drafting.say(hidden, row, len(sequence))
        if not (begins and goes_on):
            return hidden
        rows = {sequence.slot: row for row, sequence in enumerate((*begins, *goes_on))}
        order = [rows[sequence.slot] for sequence in sequences]
        return self._arrays.concatenate([hidden[row : row + 1] for row in order])

    def _begin(self, sequences: Many[Sequence]) -> Hidden:
        hidden = self.executor.begin(*_new_positions(sequences))
        _know(sequences)
        return hidden

    def _go_on(self, sequences: Many[Sequence]) -> Hidden:
        said: list[tuple[Hidden, int]] = []
        for sequence in sequences:
            assert sequence.drafting is not None
            assert sequence.drafting.said is not None
            said.append(sequence.drafting.said)
        hidden, _ = said[0]
        together = all(each is hidden for each, _ in said)
        if not together or [row for _, row in said] != list(range(len(hidden))):
            hidden = self._arrays.concatenate([each[row : row + 1] for each, row in said])
        chunks = [Chunk(sequence.slot, len(sequence) - 2, 1) for sequence in sequences]
        return self.executor.go_on(hidden, [each.tokens[-1] for each in sequences], chunks)


def _new_positions(sequences: Many[Sequence]) -> tuple[list[int], list[Chunk]]:
    """Positions that are new to the layer, and each one's next token."""
    tokens: list[int] = []
    chunks: list[Chunk] = []
    for sequence in sequences:
        assert sequence.drafting is not None
        start, stop = sequence.drafting.mark, len(sequence) - 1
        chunks.append(Chunk(sequence.slot, start, stop - start))
        tokens += sequence.tokens[start + 1 : stop + 1]
    return tokens, chunks


def _know(sequences: Many[Sequence]) -> None:
    """The layer has run all new positions; what it said is no longer known."""
    for sequence in sequences:
        assert sequence.drafting is not None
        sequence.drafting.mark, sequence.drafting.said = len(sequence) - 1, None
