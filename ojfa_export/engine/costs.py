"""What passes cost, learnt while they run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median_low

# What was seen counts this much less with each pass after it.
MEMORY = 0.98
# Before so many passes of different sizes nothing is believed.
LEAST_WEIGHT = 8.0
# Pieces of prompts: the least worth running, what the first have, and the sizes that are told apart
# where a pass takes any number.
LEAST_PIECE, FIRST_PIECE = 16, 32
ANY_SIZE = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Numbers of requests of steps that are told apart, as many to a doubling.
TO_A_DOUBLING = 2
# Samples that are remembered, and how many must be known of a step, of which the least is believed;
# how often a step is asked for alone, as not every one can be measured; passes after which a size
# that was not used is tried again.
SAMPLES, LEAST_SAMPLES, MOST_ASKED, FORGOTTEN = 4, 2, 4, 256


class PassCosts:
    """The line t = a + b n through the seconds that a block takes on n tokens, by least squares.

    Recent passes count more. a is what a block takes whatever runs, which is mostly reading its
    weights; b is what a token adds.

    Args:
        sizes: Tokens of the passes that there are, rising; None for any number.

    Attributes:
        pieces: What prompts add to steps.
    """

    def __init__(self, sizes: Sequence[int] | None = None) -> None:
        self.pieces = PieceCosts(sizes)
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, tokens: float, seconds: float, blocks: int) -> None:
        """Takes a pass."""
        x, y = float(tokens), seconds / blocks
        self._weight = MEMORY * self._weight + 1
        self._x = MEMORY * self._x + x
        self._y = MEMORY * self._y + y
        self._xx = MEMORY * self._xx + x * x
        self._xy = MEMORY * self._xy + x * y

    @property
    def knee(self) -> float:
        """Tokens from which on a pass pays: a / b, where they cost as much as the weights.

        0 while too little is known.
        """
        line = self._line()
        if line is None:
            return 0.0
        a, b = line
        return max(0.0, a / b) if b > 0 else 0.0

    def _line(self) -> tuple[float, float] | None:
        if self._weight < LEAST_WEIGHT:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        if variance < 0.25:
            return None
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        return mean_y - slope * mean_x, slope


class PieceCosts:
    """What pieces of prompts add to the steps beside which they run.

    Times of a device rise in stairs, not along a line, and a pass that is filled up takes as long
    as a full one; so each size is believed by itself. What it adds hardly depends on how many
    decode beside it (H200, Llama-2-7B's shape: 2.5 to 3.1 ms for a pass of 256, for 1 to 63).

    Args:
        sizes: Tokens of the passes that there are, rising; None where a pass takes any number.

    Attributes:
        are_filled: Whether passes are filled up to these sizes.
    """

    def __init__(self, sizes: Sequence[int] | None = None) -> None:
        self.are_filled, self._sizes = sizes is not None, tuple(sizes or ANY_SIZE)
        self._steps: dict[int, deque[float]] = {}
        # By size; the first pass of a size is made ready, and is not believed.
        self._added: dict[int, deque[float]] = {}
        self._unused: dict[int, int] = {}
        self._asked = 0  # for a step alone, in a row

    @property
    def most(self) -> int:
        """Tokens of prompts that are worth running at once."""
        return self._sizes[-1]

    def choose(self, others: int, share: float, most: float = 0.0) -> int:
        """The most tokens of prompts that add no more than a share of a step to it.

        Args:
            others: Requests of the step.
            share: Over the time of the step alone.
            most: A larger share, up to which more are taken where each adds less time.

        Returns:
            0 where that is to be measured first: the step should run alone.
        """
        step = self._step(others)
        unknown = len(step) < LEAST_SAMPLES
        self._asked = self._asked + 1 if unknown else 0
        if 0 < self._asked <= MOST_ASKED:
            return 0
        taken = others if self.are_filled else 0
        pieces = [size - taken for size in self._sizes if size - taken >= LEAST_PIECE]
        if unknown or not any(self._added.values()):
            return next((each for each in pieces if each >= FIRST_PIECE), LEAST_PIECE)
        added = {each: self._expect(each + taken) / min(step) for each in pieces}
        fitting = (each for each in pieces if added[each] <= share)
        least = max(fitting, default=pieces[0] if pieces else LEAST_PIECE)
        larger = [each for each in pieces if each > least and added[each] <= most]
        return min([least, *larger], key=lambda each: added.get(each, 0.0) / each)

    def learn(self, others: int, prompt_tokens: int, seconds: float) -> None:
        """Takes a pass.

        Args:
            others: Requests of it without a piece.
            prompt_tokens: Tokens of its pieces.
            seconds: That a block took.
        """
        for size in list(self._added):
            self._unused[size] += 1
            if self._unused[size] > FORGOTTEN:
                del self._added[size]
        if others <= 0:
            return
        if not prompt_tokens:
            self._step(others).append(seconds)
        elif step := self._step(others):
            tokens = prompt_tokens + (others if self.are_filled else 0)
            size = next((each for each in self._sizes if each >= tokens), self.most)
            self._unused[size] = 0
            if size in self._added:
                self._added[size].append(max(0.0, seconds - min(step)))
            else:
                self._added[size] = deque(maxlen=SAMPLES)

    def _step(self, others: int) -> deque[float]:
        """Samples of steps of about so many requests."""
        about = round(TO_A_DOUBLING * math.log2(others))
        return self._steps.setdefault(about, deque(maxlen=SAMPLES))

    def _expect(self, size: int) -> float:
        """What a size adds; one that is not known, as many times as it is larger than another."""
        known = sorted(each for each, samples in self._added.items() if samples)
        near = max((each for each in known if each <= size), default=known[0])
        return median_low(self._added[near]) * size / near
