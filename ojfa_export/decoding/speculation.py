"""Lossless self-speculation: an exit drafts, the remaining blocks check all drafts in one pass.

Greedy decoding gives the tokens of full depth; sampling gives the full model's distribution by
speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.exits import check_served, nearest_exit
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import real_number, whole_number

MAX_DRAFT = 8
# Tokens of a draft whose length is fixed; more are a mistake.
LONGEST_DRAFT = 1024
# The acceptance that is believed before anything was drafted, and how many tokens' worth of it.
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.7, 4.0
# A checked token counts this much less with each one after it: about 30 are remembered.
MEMORY = 0.97
# Where drafting doesn't pay, one token is drafted all the same after so many rounds, and then after
# twice as many each time, up to the most, until it pays again.
PROBE_ROUNDS, MOST_PROBE_ROUNDS = 16, 128
# What drafts must gain where others run beside: they would pay for an acceptance that is estimated
# too high, and of many estimates some always are.
LEAST_GAIN_TOGETHER = 1.1

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Speculation:
    """How to draft.

    Attributes:
        exit: Blocks that draft; 0 for the bundle's draft layer, which runs none. None for that
            layer where there is one, else for half of the blocks.
        draft: Tokens per draft; None adapts it to each sequence's acceptance (`DraftLength`).
        draft_cost: Time of drafting a token over that of a full step; None for the share of
            blocks that it runs.
        check_cost: What another token adds to the pass that checks, over the time of a full step.
        round_cost: What a pass that checks any drafts takes beside that, over the same.
        acceptance: Share of drafts that is expected to be accepted before any were.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    exit: int | None = None
    draft: int | None = None
    draft_cost: float | None = None
    check_cost: float = 0.1
    round_cost: float = 0.0
    acceptance: float = PRIOR_ACCEPTANCE

    def __post_init__(self) -> None:
        cost = "a cost of speculation"
        read: dict[str, float] = {
            "check_cost": real_number(cost, self.check_cost, 0.0),
            "round_cost": real_number(cost, self.round_cost, 0.0),
            "acceptance": real_number("an acceptance", self.acceptance, 0.0, 1.0),
        }
        if self.exit is not None:
            read["exit"] = whole_number("the exit that drafts", self.exit, 0)
        if self.draft is not None:
            read["draft"] = whole_number("the draft length", self.draft, 1, LONGEST_DRAFT)
        if self.draft_cost is not None:
            read["draft_cost"] = real_number(cost, self.draft_cost, 0.0)
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def resolve_exit(
        self, blocks: int, *, has_layer: bool = False, served: Sequence[int] | None = None
    ) -> int:
        """Blocks that draft; 0 for a draft layer.

        Args:
            blocks: Of the model.
            has_layer: Whether there is a draft layer.
            served: The exits that there are; None for all.

        Raises:
            UsageError: Not before the last block, or a draft layer that there is not.
        """
        exit = self.exit
        if exit is None:
            exit = 0 if has_layer else nearest_exit(blocks // 2, served)
        if exit == 0 and not has_layer:
            raise UsageError(
                "exit 0 can't draft: the bundle has no draft layer",
                hint=f"draft at an exit, 1..{blocks - 1}, or build the bundle with --shortcut and "
                "the file of a draft layer",
            )
        if not 0 <= exit < blocks:
            raise UsageError(
                f"exit {exit} can't draft for this model of {blocks} blocks",
                hint=f"drafts need an exit before the last block: 1..{blocks - 1}",
            )
        if exit:
            check_served((exit,), served)
        return exit


class DraftLength:
    """How many tokens to draft for one sequence, adapted to how many are accepted.

    With acceptance a, a round of K drafts gives 1 + a + ... + a^K tokens (arXiv 2211.17192, eq. 1)
    and costs 1 + r + K c full steps, r for checking at all, c for drafting a token and for checking
    it; with K = 0, a full step. The K with the most tokens per cost is taken.

    Beside others a step takes longer, and each more token that is checked is a larger part of it:
    where one sequence's token adds the share s to a pass, those of n add n s / (1 + (n - 1) s) to a
    pass of n. A round of one holds up all: among n, drafts must gain a tenth, and where they don't
    pay, each sequence tries them again an n-th as often as alone.

    Args:
        cost: c, of a sequence alone.
        round_cost: r.
        acceptance: a, before anything was drafted.
        check_cost: s, the part of c that is the check's.
    """

    def __init__(
        self,
        cost: float,
        round_cost: float = 0.0,
        acceptance: float = PRIOR_ACCEPTANCE,
        *,
        check_cost: float = 0.0,
    ) -> None:
        self._cost, self._round_cost, self._check_cost = cost, round_cost, check_cost
        self._accepted = acceptance * PRIOR_WEIGHT
        self._checked = PRIOR_WEIGHT
        # Rounds count an n-th where n run together.
        self._rounds_without, self._probe_after = 0.0, PROBE_ROUNDS

    @property
    def acceptance(self) -> float:
        """The running estimate of a."""
        return self._accepted / self._checked

    @property
    def rests(self) -> bool:
        """Whether the round after the one asked for last drafts nothing for sure."""
        # Nor if the others have ended by then.
        return 0 < self._rounds_without < self._probe_after - 1 and not self._paying(1)

    def next(self, together: int = 1) -> int:
        """The next round's draft length, 0 to MAX_DRAFT.

        Args:
            together: Sequences that run together. Only where tokens don't depend on the length:
                sampled ones would no longer be those of their seed.
        """
        if length := self._paying(together):
            self._rounds_without, self._probe_after = 0.0, PROBE_ROUNDS
            return length
        self._rounds_without += 1 / together
        if self._rounds_without < self._probe_after:
            return 0
        self._rounds_without = 0.0
        self._probe_after = min(2 * self._probe_after, MOST_PROBE_ROUNDS)
        return 1

    def _paying(self, together: int) -> int:
        """The length that is expected to gain most; 0 where none gains enough."""
        tokens = np.cumsum(self.acceptance ** np.arange(MAX_DRAFT + 1))
        rates = tokens / _costs(self._cost, self._round_cost, self._check_cost, together)
        length = int(np.argmax(rates))
        return length if together == 1 or rates[length] >= LEAST_GAIN_TOGETHER else 0

    def learn(self, accepted: int, drafted: int) -> None:
        """Takes a round's result; what follows the first rejected token says nothing."""
        for taken in [True] * accepted + [False] * (accepted < drafted):
            self._accepted = MEMORY * self._accepted + taken
            self._checked = MEMORY * self._checked + 1


@lru_cache(maxsize=1024)
def _costs(cost: float, round_cost: float, check_cost: float, together: int) -> Float64:
    """Of rounds of 0 to MAX_DRAFT drafts, in full steps; see `DraftLength`."""
    added = together * check_cost / (1 + (together - 1) * check_cost)
    lengths = np.arange(MAX_DRAFT + 1)
    rounds: Float64 = 1 + np.where(lengths > 0, round_cost, 0.0)
    return rounds + lengths * (cost - check_cost + added)


def check(
    draft: Sequence[int],
    proposals: Sequence[Float64],
    logits: Float32,
    sampling: Sampling,
    generator: np.random.Generator,
) -> list[int]:
    """The drafts that the full model takes, and the one token that it gives itself.

    A draft x, drawn from q, is taken with probability min(1, p(x) / q(x)); the first that isn't is
    replaced by a draw from max(0, p - q), normalised. After the last comes a draw from p. Each
    token is then distributed as p (arXiv 2211.17192, appendix A.1).

    Args:
        draft: K tokens.
        proposals: K distributions q [V]; none for greedy decoding.
        logits: [K + 1, V] of the full model before each draft and after the last.
        sampling: Makes p of logits; at temperature 0 the likeliest token is the only one.
        generator: Random numbers.
    """
    if sampling.temperature == 0:
        return agreeing(draft, logits.argmax(axis=-1).tolist())
    for index, (token, q) in enumerate(zip(draft, proposals, strict=True)):
        p = sampling.probabilities(logits[index])
        if generator.random() * q[token] >= p[token]:
            rest = np.maximum(p - q, 0)
            # p and q may differ by less than p - q can show.
            return [*draft[:index], draw(rest if rest.any() else p, generator)]
    return [*draft, draw(sampling.probabilities(logits[-1]), generator)]


def agreeing(draft: Sequence[int], best: list[int]) -> list[int]:
    """The drafts that are the full model's own tokens `best`, and the one token after them."""
    others = (index for index, token in enumerate(draft) if token != best[index])
    return best[: next(others, len(draft)) + 1]


def draw(weights: Float64, generator: np.random.Generator) -> int:
    """A token of a distribution [V] that need not be normalised."""
    return int(generator.choice(len(weights), p=weights / weights.sum()))
