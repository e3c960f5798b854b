"""Promises on real statistics: the demo checkpoint's exits on the text that ships.

demo_statistics.npz is statistics.npz of the demo's bundle (rank 96), thinned to every fourth
sampled token and the exits 3, 4, 5, 8 and 11 by demo_statistics.py (on another machine a confidence
may be one float16 step off). Windows are drawn independently, as the promise
assumes; what neighbours have in common is not in this simulation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from often import assert_at_most

from ojfa_export.bundle.promise import Limits
from ojfa_export.promises.outcomes import Costs
from ojfa_export.promises.simulate import simulate
from ojfa_export.promises.statistics import ExitStatistics, load_statistics


def test_promises_on_the_demo_break_no_more_often_than_they_say(rng: np.random.Generator) -> None:
    splits = load_statistics(Path(__file__).with_name("demo_statistics.npz")).values()
    first = next(iter(splits))
    population = ExitStatistics(
        first.blocks,
        first.exits,
        first.domains,
        np.concatenate([each.domain for each in splits]),
        np.concatenate([each.confidence for each in splits], axis=1),
        np.concatenate([each.agrees for each in splits]),
        np.concatenate([each.extra_surprisal for each in splits]),
    )
    result = simulate(
        population,
        Limits(max_disagreement=0.1),
        Costs.even(12, block=1, check=0.1, final=1),
        draws=200,
        tuning_windows=60,
        certification_windows=150,
        rng=rng,
    )
    assert_at_most(0.05, result.broken, result.draws, "promises on the demo broken")
    print(f"{result.early} early, at {result.relative_cost:.3f} of the cost")
    assert result.early > result.draws / 2
