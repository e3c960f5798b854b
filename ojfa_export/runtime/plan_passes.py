"""The passes that bring sequences to a depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from itertools import pairwise

from ojfa_export.backends.draft import Drafts
from ojfa_export.backends.passes import Chunk, Pass
from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.runtime.sequence import Sequence


def plan_passes(
    sequences: Many[Sequence],
    depth: int | Many[int],
    following: HeadOutput | None = None,
    stops: Many[int] | None = None,
) -> Iterator[Pass]:
    """The passes that bring all tokens of some sequences to a depth.

    A pass ends where more tokens join, those that stopped there, and where some leave. What runs
    together is what a block lacks of each sequence, whatever its length and however many tokens.

    Args:
        sequences: All before, or all beyond LongRoPE's switch.
        depth: Blocks to run, 1 or more; of all sequences, or of each.
        following: What chooses each sequence's newest token, where that is not known yet; before
            the first block nothing else is pending then.
        stops: One past the last token of each sequence that counts; None for all tokens.
    """
    targets = [depth] * len(sequences) if isinstance(depth, int) else depth
    depths = set(targets)
    for sequence, target in zip(sequences, targets, strict=True):
        depths.update(blocks.stop for blocks, _ in sequence.marks.spans(target))
    ends = stops or [len(sequence) for sequence in sequences]
    each_to = list(zip(sequences, targets, ends, strict=True))
    start = 0
    before: Pass | None = None
    for until in sorted(depths):
        chunks = tuple(
            chunk
            for each, target, stop in each_to
            if start < target and (chunk := each.chunk(start, stop)).length > 0
        )
        if before is not None and before.chunks == chunks:
            before.blocks = range(before.blocks.start, until)
        else:
            if before is not None:
                yield before
            before = None
            if chunks:
                before = Pass(range(start, until), chunks, sequences[0].long_context)
                if not start:
                    before.tokens = following or _token_ids(chunks, sequences)
        start = until
    if before is not None:
        yield before


def decode_pass(sequences: Many[Sequence], depth: int, following: HeadOutput | None) -> Pass | None:
    """The one pass that brings sequences to a depth, where each has one token pending before it.

    What `plan_passes` gives, found sooner: this is the way of every token.
    """
    entry, long_context, chunks = sequences[0].entry, sequences[0].long_context, []
    for sequence in sequences:
        last = len(sequence.tokens) - 1
        if sequence.marks.end(entry, last) < depth or sequence.long_context != long_context:
            return None
        if entry and sequence.marks[entry - 1] != last + 1:
            return None
        chunks.append(Chunk(sequence.slot, last, 1))
    step = Pass(range(entry, depth), tuple(chunks), long_context)
    if not entry:
        step.tokens = following or [sequence.tokens[-1] for sequence in sequences]
    return step


def whole_pass(
    sequences: Many[Sequence], counts: Many[int], drafts: Drafts | None, blocks: int
) -> Pass | None:
    """The one pass through all blocks that runs so many tokens of each sequence.

    None where more tokens are pending, or some of them have begun to run.
    """
    chunks, long_context = [], sequences[0].long_context
    for sequence, count in zip(sequences, counts, strict=True):
        start = len(sequence) - count
        done = sequence.marks.end(0, start) == blocks
        if not done or sequence.long_context != long_context:
            return None
        chunks.append(Chunk(sequence.slot, start, count))
    step = Pass(range(blocks), tuple(chunks), long_context)
    step.tokens = drafts or _token_ids(step.chunks, sequences)
    return step


def _token_ids(chunks: tuple[Chunk, ...], sequences: Many[Sequence]) -> list[int]:
    tokens = {sequence.slot: sequence.tokens for sequence in sequences}
    return [token for slot, start, count in chunks for token in tokens[slot][start : start + count]]


def parts_of(blocks: range, cuts: Iterable[int]) -> list[range]:
    """Blocks, cut at some depths inside."""
    bounds = [blocks.start, *sorted(cuts), blocks.stop]
    return [range(a, b) for a, b in pairwise(bounds)]


def by_context(sequences: Many[Sequence]) -> list[list[int]]:
    """Indices of the sequences that run together: LongRoPE's factors are one set for a pass."""
    groups: dict[bool, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(sequence.long_context, []).append(index)
    return list(groups.values())
