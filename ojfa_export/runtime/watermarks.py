"""How many tokens of one sequence each block has processed."""

from __future__ import annotations

from collections.abc import Iterator


class Watermarks:
    """Marks of all blocks, non-increasing with depth.

    Blocks in a row mostly have the same mark, so they are kept as a few spans: what a pass does
    per span it need not do per block.

    Args:
        blocks: How many; all marks begin at 0.
    """

    def __init__(self, blocks: int) -> None:
        self._spans: list[tuple[int, int]] = [(blocks, 0)]  # (one past the last block, mark)

    def __getitem__(self, block: int) -> int:
        """The mark of a block."""
        for stop, mark in self._spans:
            if block < stop:
                return mark
        raise IndexError(block)

    def first_below(self, mark: int) -> int:
        """The first block with a lower mark; the number of blocks where there is none."""
        start = 0
        for stop, each in self._spans:
            if each < mark:
                return start
            start = stop
        return start

    def copy_below(self, limit: int) -> Watermarks:
        """The same marks, none above a limit."""
        copy = Watermarks(self._spans[-1][0])
        copy._spans = list(self._spans)
        copy.lower_to(limit)
        return copy

    def spans(self, depth: int) -> Iterator[tuple[range, int]]:
        """Blocks 0 .. depth-1 in runs of equal marks, and the marks."""
        start = 0
        for stop, mark in self._spans:
            if start >= depth:
                return
            yield range(start, min(stop, depth)), mark
            start = stop

    def end(self, block: int, mark: int) -> int:
        """One past the last block that has this mark, as all from `block` on have."""
        for stop, each in self._spans:
            if block < stop:
                return stop if each == mark else block
        return block

    def raise_to(self, mark: int, depth: int) -> None:
        """Raises the marks of the first blocks that are lower."""
        higher = [span for span in self._spans if span[1] > mark]
        if higher and higher[-1][0] >= depth:
            return
        deeper = [span for span in self._spans if span[0] > depth]
        if deeper and deeper[0][1] == mark:
            self._spans = [*higher, *deeper]
        else:
            self._spans = [*higher, (depth, mark), *deeper]

    def lower_to(self, mark: int) -> None:
        """Lowers every mark that is higher."""
        higher = [stop for stop, each in self._spans if each >= mark]
        lower = [span for span in self._spans if span[1] < mark]
        self._spans = [(higher[-1], mark), *lower] if higher else lower
