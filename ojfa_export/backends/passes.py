"""The unit of work of an executor: some tokens of some sequences, through some blocks."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from ojfa_export.decoding.arrays import Hidden


class GivesTokens(Protocol):
    """Tokens that may be on their way: of a `HeadOutput`, or drafts (`backends.draft.Drafts`)."""

    def tokens(self) -> list[int]:
        """The tokens, row by row; waits for them."""
        ...


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence.

    Attributes:
        slot: The sequence's place in the KV cache.
        start: Position of the first token.
        length: How many tokens.
    """

    slot: int
    start: int
    length: int


@dataclass(slots=True)
class Pass:
    """Tokens of any sequences, any number of each, through consecutive blocks.

    Attributes:
        blocks: Which blocks, from 0.
        chunks: Whose tokens, in the order of the rows of hidden states; each slot at most once.
        long_context: Whether LongRoPE's long factors apply.
        tokens: Where the first block is block 0: the token ids, in the order of the rows, or the
            choices or drafts that they will be (see `Engines.follows`); else None.
    """

    blocks: range
    chunks: tuple[Chunk, ...]
    long_context: bool
    tokens: list[int] | GivesTokens | None = None

    @property
    def is_decode(self) -> bool:
        """Whether it is one token of each sequence."""
        return all(chunk.length == 1 for chunk in self.chunks)


@dataclass(slots=True)
class Newest:
    """What the newest pass of an executor gave, as long as it lies where it was computed.

    Attributes:
        depth: Blocks that its tokens have run; 0 where there is none.
        chunks: Whose tokens.
        hidden: [tokens, H].
    """

    depth: int = 0
    chunks: tuple[Chunk, ...] = ()
    hidden: Hidden = None

    def is_of(self, step: Pass) -> bool:
        """Whether a pass goes on with just these tokens."""
        return self.depth == step.blocks.start > 0 and self.chunks == step.chunks

    def set(self, step: Pass, hidden: Hidden) -> None:
        """Takes what a pass gave."""
        self.depth, self.chunks, self.hidden = step.blocks.stop, step.chunks, hidden

    def clear(self) -> None:
        """Forgets it: a pass is under way, or tokens were dropped."""
        self.depth, self.chunks, self.hidden = 0, (), None


def row_ranges(chunks: Sequence[Chunk]) -> list[range]:
    """The rows of hidden states that belong to each chunk."""
    stops = accumulate(chunk.length for chunk in chunks)
    return [range(stop - chunk.length, stop) for chunk, stop in zip(chunks, stops, strict=True)]


def positions_of(chunks: Sequence[Chunk]) -> list[int]:
    """Each token's position in its sequence."""
    if len(chunks) == 1:
        [(_, start, count)] = chunks
        return list(range(start, start + count))
    return [start + token for _, start, count in chunks for token in range(count)]


def slots_of(chunks: Sequence[Chunk]) -> list[int]:
    """Each token's slot."""
    return [slot for slot, _, count in chunks for _ in range(count)]


def store_chunks(states: Any, chunks: Sequence[Chunk], hidden: Any) -> None:
    """Writes hidden states [tokens, H] to `states` [slots, positions, H], arrays like NumPy's."""
    at = 0
    for slot, start, count in chunks:
        states[slot, start : start + count] = hidden[at : at + count]
        at += count


def load_chunks(arrays: Any, states: Any, chunks: Sequence[Chunk]) -> Any:
    """Hidden states [tokens, H] of chunks, from `states` [slots, positions, H]."""
    parts = [states[slot, start : start + count] for slot, start, count in chunks]
    return parts[0].copy() if len(parts) == 1 else arrays.concatenate(parts)


def split_pass(chunks: Sequence[Chunk], longest: int) -> list[list[int]]:
    """Which chunks can run together on an executor that pads chunks to one length.

    Args:
        chunks: Of the pass.
        longest: Chunks of up to so many tokens run together; of each longer one alone.

    Returns:
        Indices of the chunks of each part.
    """
    short = [index for index, chunk in enumerate(chunks) if chunk.length <= longest]
    parts = [[index] for index, chunk in enumerate(chunks) if chunk.length > longest]
    return [short, *parts] if short else parts


def cut_pass(chunks: Sequence[Chunk], most: int) -> list[list[Chunk]]:
    """Cuts a pass into pieces of at most so many tokens, to run one after the other."""
    pieces: list[list[Chunk]] = [[]]
    room = most
    for slot, start, length in chunks:
        stop = start + length
        while start < stop:
            if not room:
                pieces.append([])
                room = most
            count = min(room, stop - start)
            pieces[-1].append(Chunk(slot, start, count))
            start, room = start + count, room - count
    return pieces


def rows_of(ranges: Sequence[range], part: Sequence[int]) -> slice | list[int]:
    """The rows of some chunks, as a slice where they are neighbours."""
    rows = [row for index in part for row in ranges[index]]
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return rows


def select_chunks(
    chunks: Sequence[Chunk], hidden: Hidden, slots: AbstractSet[int]
) -> tuple[Sequence[Chunk], Hidden]:
    """The chunks of some slots, and their rows of hidden states [tokens, H]."""
    wanted = [index for index, chunk in enumerate(chunks) if chunk.slot in slots]
    if len(wanted) == len(chunks):
        return chunks, hidden
    if not wanted:
        return [], hidden[:0]
    rows = rows_of(row_ranges(chunks), wanted)
    return [chunks[index] for index in wanted], hidden[rows]


def write_rows(target: Any, rows: slice | list[int], values: Any) -> None:
    """Writes rows of hidden states, of arrays like NumPy's, wherever they go."""
    if isinstance(rows, slice):
        target[rows] = values
        return
    for index, row in enumerate(rows):
        target[row : row + 1] = values[index : index + 1]


def as_rows(values: Sequence[int]) -> Any:
    """Token ids as an embedding takes them, [tokens, 1] int32."""
    return np.array(values, np.int32)[:, None]
