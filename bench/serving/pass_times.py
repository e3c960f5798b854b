"""What a pass takes by what runs in it: measured on an H200 at Llama-2-7B's shape in fp16.

Commit b6af065; steps are those of bench/results/gpu-h200-serving-llama2-7b.json, passes with pieces
of prompts were taken in the same sitting. Between measured points times are on a line.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

# Milliseconds of a step, by the requests that decode past 512.
STEPS = {1: 3.84, 4: 4.34, 16: 5.54, 32: 6.44, 64: 8.53}
# Of passes with pieces, by the tokens that they are filled up to, with so many decoding beside.
FEW, MANY = 16, 50
FILLED = {
    64: (5.9, 7.5),
    128: (6.8, 10.6),
    256: (8.1, 12.5),
    512: (12.7, 15.6),
    768: (20.7, 23.0),
}
# Of prompts alone.
ALONE = {512: 11.0, 2048: 47.4}
# Tokens before those that decode in these steps, and microseconds that one more takes:
# bench/results/gpu-h200-attention-llama2-7b.json, attention of 64 past 512, times 32 blocks.
CONTEXT, CONTEXT_US = 566, 134.18 * 32 / (64 * 512)
# Passes that there are, and blocks of the model.
SIZES = (64, 128, 256, 512, 768, 1024, 1280, 1536, 2048)
BLOCKS = 32


class Load(NamedTuple):
    """What runs in a pass.

    Attributes:
        full: Requests that decode at full depth.
        shallow: That leave at half depth.
        full_tokens: Of pieces of prompts at full depth.
        shallow_tokens: Of those that leave at half depth.
        context: Tokens before those that decode; of those at half depth half as many.
    """

    full: int = 0
    shallow: int = 0
    full_tokens: int = 0
    shallow_tokens: int = 0
    context: float = 0.0


def on_a_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x between measured points, and beyond them along the last two."""
    at = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (left, low), (right, high) = points[at - 1], points[at]
    return low + (high - low) * (x - left) / (right - left)


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds of passes of one device and model.

    Half of the blocks take half of the time: at this shape embedding and heads are not seen beside
    them (bench/results/gpu-h200-passes-llama2-7b.json: 16 blocks take 0.496 of 32).

    Attributes:
        steps: By requests that decode.
        filled: By tokens that a pass with pieces is filled up to, with `FEW` and `MANY` decoding.
        alone: By tokens of prompts alone.
        sizes: Tokens of the passes with pieces that there are.
        context_us: Microseconds that a token of context beyond `CONTEXT` adds.
    """

    steps: dict[int, float] = field(default_factory=lambda: dict(STEPS))
    filled: dict[int, tuple[float, float]] = field(default_factory=lambda: dict(FILLED))
    alone: dict[int, float] = field(default_factory=lambda: dict(ALONE))
    sizes: tuple[int, ...] = SIZES
    context_us: float = CONTEXT_US

    @cached_property
    def _known(self) -> dict[tuple[int, int], float]:
        return {}

    @cached_property
    def _steps(self) -> list[tuple[float, float]]:
        return sorted(self.steps.items())

    @cached_property
    def _idle(self) -> list[tuple[float, float]]:
        """Of prompts alone, where that was not measured by the line through FEW and MANY."""
        lines = {
            size: few - (many - few) * FEW / (MANY - FEW)
            for size, (few, many) in self.filled.items()
        }
        return sorted({**lines, **self.alone}.items())

    def all_blocks(self, decoding: int, tokens: int) -> float:
        """Milliseconds of a pass of all blocks.

        Args:
            decoding: Requests that decode, a token each.
            tokens: Of pieces of prompts.
        """
        if not tokens:
            return on_a_line(self._steps, decoding) if decoding else 0.0
        size = next(each for each in self.sizes if each >= decoding + tokens)
        if (size, decoding) not in self._known:
            self._known[size, decoding] = self._with_pieces(size, decoding)
        return self._known[size, decoding]

    def of_pass(self, load: Load) -> float:
        """Milliseconds of a pass in which some run half of the blocks, the others all.

        The first half of the blocks runs for all, the second for those at full depth.
        """
        full, shallow, full_tokens, shallow_tokens, context = load
        first = self.all_blocks(full + shallow, full_tokens + shallow_tokens)
        second = self.all_blocks(full, full_tokens)
        more = context - CONTEXT * (full + shallow / 2)
        return (first + second) / 2 + 1e-3 * self.context_us * more

    def _with_pieces(self, size: int, decoding: int) -> float:
        alone = on_a_line(self._idle, size)
        # Above the sizes that were measured, a request beside adds what it does to the largest.
        few, many = self.filled.get(size, self.filled[max(self.filled)])
        if size not in self.filled:
            slope = (many - few) / (MANY - FEW)
            return alone + slope * decoding
        return on_a_line([(0, alone), (FEW, few), (MANY, many)], decoding)
