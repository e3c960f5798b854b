"""Paths of exit policies, from full depth to the most eager, that one number leads along."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.measures import MEASURES, round_up
from ojfa_export.promises.outcomes import Costs, Float64, Outcome, apply_thresholds
from ojfa_export.promises.statistics import ExitStatistics

# Candidates of a path: fixed-sequence testing pays nothing for many.
STEPS = 80
# Tokens of an exit that its curve is looked at, spread evenly.
LOOKS = 512


@dataclass(frozen=True, eq=False)
class AgreementCurve:
    """How often an exit's tokens agree with the full model, by its confidence.

    Isotonic regression is flat over many tokens, and then jumps, so that a promise between two
    steps would get the lower one. Between the middles of its steps, agreement is taken to rise
    evenly. Whatever the curve, certification tests what comes of it on other text.

    Attributes:
        confidence: [k] increasing, the middle of each step; the first is where all are sure.
        agreement: [k], increasing with it.
        errors: [looks] the shares that don't agree, at tokens spread evenly.
    """

    confidence: Float64
    agreement: Float64
    errors: Float64

    @classmethod
    def of(cls, confidence: Float64, agrees: NDArray[np.bool_]) -> AgreementCurve:
        """Of tokens [n], n >= 1, by isotonic regression."""
        starts, agreement = isotonic(confidence, agrees)
        ordered = np.sort(confidence)
        bounds = np.append(np.searchsorted(ordered, starts), ordered.size)
        middles = ordered[(bounds[:-1] + bounds[1:]) // 2]
        middles[0] = starts[0]
        looked = ordered[np.linspace(0, ordered.size - 1, min(LOOKS, ordered.size)).astype(int)]
        return cls(middles, agreement, 1 - np.interp(looked, middles, agreement))

    def thresholds(self, errors: Float64) -> Float64:
        """The confidence from which on at most these shares of tokens don't agree, [m].

        Values of float16, so that statistics compare as a request does; infinite where the surest
        tokens don't agree so often.
        """
        found = np.interp(1 - errors, self.agreement, self.confidence)
        found = round_up(found).astype(np.float64)
        found[1 - errors > self.agreement[-1]] = np.inf
        return found


@dataclass(frozen=True, eq=False)
class Path:
    """Candidate policies from full depth to the most eager.

    At each step an exit's threshold is the least confidence at which its tokens agree with the full
    model with a probability that all exits have in common. More eagerness lowers every threshold,
    so no token leaves later than before. Each step lets about as many more leave.

    Attributes:
        measure: Of confidence.
        exits: [E] blocks run.
        curves: [E], of the tuning split.
    """

    measure: Measure
    exits: tuple[int, ...]
    curves: tuple[AgreementCurve, ...]

    @cached_property
    def thresholds(self) -> Float64:
        """[steps, E]; infinite where the exit is not taken."""
        pooled = np.concatenate([curve.errors for curve in self.curves])
        eagerness = np.unique(np.quantile(pooled, np.linspace(0, 1, STEPS)))
        return np.stack([curve.thresholds(eagerness) for curve in self.curves], axis=1)

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.thresholds)

    def policy(self, step: int) -> ExitPolicy | None:
        """The candidate at a step of the path; None is full depth."""
        taken = np.flatnonzero(np.isfinite(self.thresholds[step]))
        if not len(taken):
            return None
        return ExitPolicy(
            exits=tuple(self.exits[i] for i in taken),
            measure=self.measure,
            thresholds=tuple(float(self.thresholds[step, i]) for i in taken),
        )

    def only(self, exits: tuple[int, ...]) -> Path:
        """The path that uses some of the exits."""
        curves = tuple(self.curves[self.exits.index(depth)] for depth in exits)
        return Path(self.measure, exits, curves)

    def apply(
        self, step: int, statistics: ExitStatistics, costs: Costs, surprisal_clip: float
    ) -> Outcome:
        """What the candidate at a step does to the statistics' tokens."""
        columns = [statistics.exits.index(depth) for depth in self.exits]
        return apply_thresholds(
            statistics, self.measure, columns, self.thresholds[step], costs, surprisal_clip
        )


def paths(tuning: ExitStatistics) -> list[Path]:
    """For each measure, the path that uses every exit."""
    return [_path(tuning, measure) for measure in MEASURES]


def _path(tuning: ExitStatistics, measure: Measure) -> Path:
    curves = tuple(
        AgreementCurve.of(
            tuning.of(measure)[..., column].astype(np.float64).ravel(),
            tuning.agrees[..., column].ravel(),
        )
        for column in range(len(tuning.exits))
    )
    return Path(measure, tuning.exits, curves)


def isotonic(confidence: Float64, agrees: NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """The increasing step function of confidence nearest to `agrees` in least squares.

    Pool-adjacent-violators (Ayer et al., 1955).

    Args:
        confidence: [n], n >= 1.
        agrees: [n].

    Returns:
        The confidence at which each step begins, and the share that agrees there; both increase.
    """
    starts, inverse = np.unique(confidence, return_inverse=True)
    sizes = np.bincount(inverse)
    hits = np.bincount(inverse, weights=agrees)
    pooled: list[tuple[float, float, float]] = []  # start, hits, size
    for start, hit, size in zip(starts.tolist(), hits.tolist(), sizes.tolist(), strict=True):
        while pooled and pooled[-1][1] * size >= hit * pooled[-1][2]:
            start, more_hits, more = pooled.pop()
            hit, size = hit + more_hits, size + more
        pooled.append((start, hit, size))
    steps = np.array(pooled)
    return steps[:, 0], steps[:, 1] / steps[:, 2]
