"""What passes cost, learnt while they run."""

from __future__ import annotations

# What was seen counts this much less with each pass after it.
MEMORY = 0.98
# Before so many passes of different sizes nothing is believed.
LEAST_WEIGHT = 8.0


class PassCosts:
    """The line t = a + b n through the seconds that a block takes on n tokens, by least squares.

    Recent passes count more. a is what a block takes whatever runs, which is mostly reading its
    weights; b is what a token adds.
    """

    def __init__(self) -> None:
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

    def seconds(self, tokens: int, blocks: int) -> float | None:
        """What a pass is expected to take; None while too little is known."""
        line = self._line()
        return None if line is None else blocks * max(0.0, line[0] + line[1] * tokens)

    def token_seconds(self, blocks: int) -> float | None:
        """What another token of a pass adds; None while too little is known."""
        line = self._line()
        return None if line is None or line[1] <= 0 else blocks * line[1]

    def _line(self) -> tuple[float, float] | None:
        if self._weight < LEAST_WEIGHT:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        if variance < 0.25:
            return None
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        return mean_y - slope * mean_x, slope
