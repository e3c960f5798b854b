"""How often a promise is broken, by drawing calibration text anew many times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ojfa_export.bundle.promise import Limits
from ojfa_export.promises.certify import certify
from ojfa_export.promises.choose import exits_to_certify
from ojfa_export.promises.outcomes import Costs, apply
from ojfa_export.promises.statistics import ExitStatistics


@dataclass(frozen=True)
class Simulation:
    """Outcomes of many draws.

    Attributes:
        draws: Promises made.
        broken: Those whose policy breaks a limit in a domain of the population.
        early: Those that are not full depth.
        relative_cost: Mean over the draws, on the population.
        disagreement: [draws] in the population's worst domain.
    """

    draws: int
    broken: int
    early: int
    relative_cost: float
    disagreement: tuple[float, ...]


def simulate(
    population: ExitStatistics,
    limits: Limits,
    costs: Costs,
    *,
    draws: int,
    tuning_windows: int,
    certification_windows: int,
    rng: np.random.Generator,
) -> Simulation:
    """Draws both splits from a population of windows, with replacement, and certifies each time.

    As a build does, certification looks at the exits that tuning finds worth it. The draws are then
    independent and of one distribution, the population, whose risk under each policy is known
    exactly: just what the promise speaks of.

    Args:
        population: Windows of every domain.
        limits: What is promised.
        costs: Of a token.
        draws: How many times.
        tuning_windows: Drawn from each domain for the tuning split.
        certification_windows: The same for the certification split.
        rng: The source of the draws.
    """
    members = population.members()

    def draw(count: int) -> ExitStatistics:
        return population.select(np.concatenate([rng.choice(rows, count) for rows in members]))

    broken, early = 0, 0
    relative, worst = [], []
    for _ in range(draws):
        tuning, certification = draw(tuning_windows), draw(certification_windows)
        exits = exits_to_certify(tuning, limits, (), costs, certification_windows)
        promise = certify(tuning, certification.at(exits), limits, costs)
        if promise.policy is None:
            relative.append(1.0)
            worst.append(0.0)
            continue
        early += 1
        outcome = apply(population, promise.policy, costs, limits.surprisal_clip)
        relative.append(float(outcome.cost.mean()) / costs.full)
        worst.append(max(float(outcome.disagreement[rows].mean()) for rows in members))
        surprisal = max(float(outcome.extra_surprisal[rows].mean()) for rows in members)
        risks = [worst[-1], surprisal]
        broken += any(risk > limit for risk, limit in zip(risks, limits.shares(), strict=False))
    return Simulation(draws, broken, early, float(np.mean(relative)), tuple(worst))
