"""Calibration windows under a policy, against walking through it token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BundleError
from ojfa_export.promises.drift.unit import calibration_units
from ojfa_export.promises.outcomes import Costs, apply
from ojfa_export.promises.statistics import ExitStatistics

Population = Callable[..., ExitStatistics]


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    thresholds=st.dictionaries(st.sampled_from([4, 8, 10]), st.floats(-0.2, 1.1), max_size=3),
    measure=st.sampled_from(["top", "margin", "entropy"]),
)
def test_windows_token_by_token(
    population: Population, thresholds: dict[int, float], measure: Measure
) -> None:
    text = population(windows=3, tokens=8)
    exits = tuple(sorted(thresholds))
    policy = ExitPolicy(
        exits=exits, measure=measure, thresholds=tuple(thresholds[exit] for exit in exits)
    )
    units = calibration_units(text, policy, None)
    for window, unit in enumerate(units):
        differ = 0
        for token in range(8):
            asked = np.full(len(exits), np.nan)
            depth = 12
            for index, exit_ in enumerate(exits):
                column = text.exits.index(exit_)
                asked[index] = text.of(measure)[window, token, column]
                if asked[index] >= thresholds[exit_]:
                    depth = exit_
                    differ += not text.agrees[window, token, column]
                    break
            assert unit.blocks_run[token] == depth
            np.testing.assert_array_equal(unit.confidence[token], asked)
        assert unit.loss == pytest.approx(differ / 8)
    outcome = apply(text, policy, Costs.even(12, 1, 0.1, 0.3), 10)
    np.testing.assert_allclose([unit.loss for unit in units], outcome.disagreement)
    np.testing.assert_allclose([unit.blocks_run.mean() for unit in units], outcome.depth)


def test_windows_of_one_domain(population: Population) -> None:
    text = population(windows=5)
    policy = ExitPolicy(exits=(8,), measure="top", thresholds=(0.6,))
    every = calibration_units(text, policy, None)
    found = [calibration_units(text, policy, name) for name in text.domains]
    assert [unit.loss for units in found for unit in units] == [unit.loss for unit in every]


def test_statistics_that_lack_an_exit(population: Population) -> None:
    policy = ExitPolicy(exits=(5,), measure="top", thresholds=(0.6,))
    with pytest.raises(BundleError, match="statistics lack exit 5"):
        calibration_units(population(windows=2), policy, None)
