"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.arrays import Float32
from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import instance, listed, real_number, whole_number


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 for greedy; else logits are divided by it.
        top_k: Sample among this many most likely tokens; None for all.
        top_p: Sample among the fewest tokens that hold this much probability (nucleus sampling,
            arXiv 1904.09751).
        seed: Of the random numbers; each sequence of a batch has its own stream, so that a
            sequence's tokens don't depend on its neighbours.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        all_tokens = "to sample among all tokens"
        read = {
            "temperature": real_number(
                "temperature",
                self.temperature,
                0.0,
                hint="0 is greedy decoding, 1 the model's own distribution",
            ),
            "top_p": real_number(
                "top-p",
                self.top_p,
                0.0,
                1.0,
                above_low=True,
                wanted="above 0 and at most 1",
                hint=f"leave it out, or give 1, {all_tokens}",
            ),
            "seed": whole_number("seed", self.seed, 0, hint="leave it out for seed 0"),
        }
        if self.top_k is not None:
            hint = f"leave it out {all_tokens}"
            read["top_k"] = whole_number("top-k", self.top_k, 1, hint=hint)
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def generator(self, row: int) -> np.random.Generator:
        """The random numbers of one sequence."""
        return np.random.default_rng([self.seed, row])

    def draw(self, generator: np.random.Generator) -> float:
        """The random number that chooses one token; greedy decoding takes none."""
        return float(generator.random()) if self.temperature else 0.0

    def choose(self, logits: Float32, generator: np.random.Generator) -> int:
        """Chooses a token from logits [V]."""
        return self.pick(logits, self.draw(generator))

    def pick(self, logits: Float32, draw: float) -> int:
        """The token that a number from [0, 1) stands for, as in `numpy.random.Generator.choice`."""
        if self.temperature == 0:
            return int(logits.argmax())
        shares = np.cumsum(self.probabilities(logits))
        return int(np.searchsorted(shares / shares[-1], draw, side="right"))

    def probabilities(self, logits: Float32) -> NDArray[np.float64]:
        """The distribution that tokens are drawn from, [V] float64; temperature must not be 0."""
        below = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # a tiny temperature leaves the largest logit alone
            weights = np.exp(below / self.temperature)
        order = np.argsort(-weights, kind="stable")
        ranked = weights[order]
        if self.top_k is not None:
            ranked[self.top_k :] = 0
        ranked /= ranked.sum()
        if self.top_p < 1:  # 1 keeps all, whatever their sums are rounded to
            # A token stays if those before it hold less than top_p: the first always does.
            before = np.concatenate([[0.0], np.cumsum(ranked)[:-1]])
            ranked[before >= self.top_p] = 0
        probabilities: NDArray[np.float64] = np.empty_like(weights)
        probabilities[order] = ranked / ranked.sum()
        return probabilities


GREEDY = Sampling()


def check_draws(sampling: Sampling, draws: Sequence[float], count: int) -> Sequence[float]:
    """A number from [0, 1) for each of so many sequences where tokens are sampled, else none.

    Raises:
        UsageError: Something else.
    """
    instance("sampling", sampling, Sampling)
    if not sampling.temperature:
        return ()
    numbers = listed("draws", draws, lambda each: real_number("a draw", each, 0.0, 1.0))
    if len(numbers) != count or 1.0 in numbers:
        raise UsageError(
            f"sampling takes a number from [0, 1) for each of {count} sequences",
            hint="draw them from a generator of your own, or choose greedily",
        )
    return numbers
