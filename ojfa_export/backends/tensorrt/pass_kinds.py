"""Kinds of passes: those that one recording serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from ojfa_export.backends.tensorrt.attention import STEP_QUERIES
from ojfa_export.backends.tensorrt.tiled import MOST_TILED_TOKENS
from ojfa_export.backends.tensorrt.workspace import CHUNKS


def pass_kinds(sizes: Sequence[int], sequences: int, length: int) -> Iterator[list[int]]:
    """Lengths of the chunks of a pass, for every kind that there may be of some sequences.

    Args:
        sizes: Of passes with prompts, rising; see `PagedCache.pass_sizes`.
        sequences: That may run together.
        length: Tokens of a sequence at most.
    """
    yield from ([1] * count for count in range(1, sequences + 1))
    yield from _of_few_tokens(sequences, length)
    for least, most in zip(_numbers(sequences), CHUNKS, strict=False):
        for steps in {least, min(most, sequences)}:  # one of which is the rest of a prompt
            if steps + 1 > MOST_TILED_TOKENS and length > 1:
                yield [2] + [1] * (steps - 1)
    for size, few, prompts, longest in product(
        sizes, [0, *_numbers(sequences)], _numbers(sequences), (1, 2)
    ):
        if few + prompts > sequences or (longest > 1 and not few):
            continue
        each = min((size - few - (longest - 1)) // prompts, length)
        if each <= STEP_QUERIES:
            continue
        chunks = [longest] * min(few, 1) + [1] * (few - 1) + [each] * prompts
        below = max((other for other in sizes if other < size), default=0)
        if sum(chunks) > below:
            yield chunks
            if len(chunks) == 1 and each == size > STEP_QUERIES + 1:
                yield [each - 1]  # one chunk is another kind where it fills the pass


def _of_few_tokens(sequences: int, length: int) -> Iterator[list[int]]:
    """Passes of a few tokens, more than one of a sequence, which are not filled up."""
    for tokens in range(2, MOST_TILED_TOKENS + 1):
        if tokens <= min(STEP_QUERIES, length):
            yield [tokens]
        for chunks in _numbers(min(sequences, tokens - 1)):
            if chunks > 1:
                rest = tokens - chunks
                more = [min(rest - at, STEP_QUERIES - 1) for at in range(0, rest, STEP_QUERIES - 1)]
                if len(more) <= chunks and max(more) < length:
                    yield [1 + each for each in more] + [1] * (chunks - len(more))


def _numbers(most: int) -> list[int]:
    """The least number of chunks of every number that they are rounded up to."""
    return [least for least in (1, *(below + 1 for below, _ in pairwise(CHUNKS))) if least <= most]
