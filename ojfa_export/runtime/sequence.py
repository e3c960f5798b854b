"""One sequence: its tokens, its place in the KV cache, and how far each block has come with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager

from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Hidden
from ojfa_export.runtime.watermarks import Watermarks

# In place of a token that is not known yet, and that no pass names.
UNKNOWN = -1


class Drafting:
    """What a draft layer knows of one sequence; see `runtime.drafter`.

    Args:
        depth: Blocks that a position has run when all states are there that the layer sees.

    Attributes:
        depth: As given.
        mark: Positions that the layer has run on those states.
        said: What it said last, as a row of an array; None since tokens were dropped.
        said_after: How many tokens there were then.
    """

    __slots__ = ("depth", "mark", "said", "said_after")

    def __init__(self, depth: int) -> None:
        self.depth, self.mark = depth, 0
        self.said: tuple[Hidden, int] | None = None
        self.said_after = 0

    def say(self, hidden: Hidden, row: int, length: int) -> None:
        """Takes what the layer says after so many tokens."""
        self.said, self.said_after = (hidden, row), length

    def can_go_on(self, length: int) -> bool:
        """Whether a chain goes on from so many tokens."""
        return self.said is not None and self.said_after == length

    def lower_to(self, length: int) -> None:
        """Forgets what it knows beyond so many tokens: a position needs the token after it."""
        self.mark, self.said = max(0, min(self.mark, length - 1)), None


class Sequence:
    """Tokens of one request, and how many of them each block has processed.

    Each block has a watermark: how many of the tokens it has processed. Deeper blocks are never
    ahead of shallower ones. A token that stopped at an exit is pending there; when a later one goes
    deeper it catches up in the same pass, so that a token that reaches the last block sees exactly
    the KV cache that the full model would have.

    Args:
        slot: Its place in the KV cache.
        blocks: Of the model.
        rotary_switch: Tokens beyond which LongRoPE's long factors apply, if there are any.
        draft_depth: Where a draft layer drafts for it, as of `Drafting`; else None.
        asks: Exits that it will be asked at, as far as that is known.

    Attributes:
        slot: As given.
        tokens: Token ids so far.
        marks: The watermarks.
        expected: Whether the newest token runs before it is appended; see `expecting`.
        drafting: What a draft layer knows of it; None where none drafts for it.
        asks: As given.
        exits: By exit that is used and has a block behind it: tokens that this has processed, never
            more than the model's block before it; see `runtime.exit_runner`.
    """

    __slots__ = (
        "_rotary_switch",
        "asks",
        "drafting",
        "exits",
        "expected",
        "marks",
        "slot",
        "tokens",
    )

    def __init__(
        self,
        slot: int,
        blocks: int,
        rotary_switch: int | None = None,
        draft_depth: int | None = None,
        asks: Iterable[int] = (),
    ) -> None:
        self.slot = slot
        self.asks = frozenset(asks)
        self.exits: dict[int, int] = {}
        self.tokens: list[int] = []
        self.marks = Watermarks(blocks)
        self.expected = False
        self.drafting = None if draft_depth is None else Drafting(draft_depth)
        self._rotary_switch = rotary_switch

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def long_context(self) -> bool:
        """Whether LongRoPE's long factors apply."""
        switch = self._rotary_switch
        return switch is not None and len(self.tokens) > switch

    def append(self, token_ids: list[int]) -> None:
        """Takes new tokens, which are then pending before the first block.

        The first of them is the one that was expected, if one was: that runs already.
        """
        if self.expected:
            self.expected = False
            self.tokens[-1] = token_ids[0]
            token_ids = token_ids[1:]
        if token_ids:
            self._resize(len(self.tokens) + len(token_ids))
            self.tokens.extend(token_ids)

    def drop_expected(self) -> None:
        """Drops the token that was expected, if one was, and what was computed of it."""
        if self.expected:
            self.truncate(len(self.tokens) - 1)

    def truncate(self, length: int) -> None:
        """Drops the tokens after the first `length`: a change of numbers, nothing is computed."""
        self.expected = self.expected and length >= len(self.tokens)
        self._resize(length)
        del self.tokens[length:]

    @property
    def entry(self) -> int:
        """The first block that has tokens pending; the number of blocks where there is none."""
        return self.marks.first_below(len(self.tokens))

    def pending(self, depth: int) -> int:
        """Tokens that have not run the first `depth` blocks, `depth` being 1 or more."""
        return len(self.tokens) - self.marks[depth - 1]

    @property
    def can_draft(self) -> bool:
        """Whether a draft layer can begin: it knows all tokens but the newest, and there are any.

        Tokens that left at an exit, or wait, are known once they have caught up.
        """
        if self.drafting is None:
            return False
        return 0 < self.marks[self.drafting.depth - 1] == len(self.tokens) - 1

    def lower_to(self, length: int) -> None:
        """Forgets what was computed beyond so many tokens."""
        self.marks.lower_to(length)
        # Of a sequence that begins anew, exits are used as they are asked again.
        self.exits = {exit: min(mark, length) for exit, mark in self.exits.items() if length}
        if self.drafting is not None:
            self.drafting.lower_to(length)

    def take_over(self, other: Sequence, count: int) -> None:
        """Takes over what is known of another's first tokens, which are the same.

        Of exits only those that it will ask: states after others need not be kept for it.
        """
        self.marks = other.marks.copy_below(count)
        shared = {exit: min(mark, count) for exit, mark in other.exits.items()}
        self.exits = {exit: mark for exit, mark in shared.items() if exit in self.asks}
        if self.drafting is not None:
            assert other.drafting is not None
            self.drafting.mark = other.drafting.mark
            self.drafting.lower_to(count)

    @property
    def room_before_switch(self) -> int:
        """Tokens that may follow before all positions are rotated by LongRoPE's long factors."""
        switch = self._rotary_switch
        if switch is None or len(self.tokens) > switch:
            return sys.maxsize
        return switch - len(self.tokens)

    def chunk(self, block: int, stop: int | None = None) -> Chunk:
        """The tokens that are pending before a block or before blocks above it.

        Args:
            block: Which.
            stop: One past the last of them that counts; None for all.
        """
        start = self.marks[block]
        return Chunk(self.slot, start, (len(self.tokens) if stop is None else stop) - start)

    def _resize(self, length: int) -> None:
        """Makes the marks fit a new length.

        LongRoPE rotates every position by the sequence's length class: a change starts over.
        """
        switch = self._rotary_switch
        if switch is not None and (length > switch) != self.long_context:
            self.lower_to(0)
        elif length < len(self.tokens):
            self.lower_to(length)


@contextmanager
def expecting(sequences: Many[Sequence], tokens: Many[int] | None = None) -> Iterator[None]:
    """Gives each sequence its next token, to be run before anybody has seen or taken it.

    `Sequence.append` is told what it was, `Sequence.drop_expected` that there is none. Where the
    block fails, there is none.

    Args:
        sequences: None of which expects one.
        tokens: The tokens, or what stands for them; see `HeadOutput.stand_ins`.
    """
    for sequence, token in zip(sequences, tokens or [UNKNOWN] * len(sequences), strict=True):
        sequence.append([token])
        sequence.expected = True
    try:
        yield
    except BaseException:
        for sequence in sequences:
            sequence.drop_expected()
        raise
