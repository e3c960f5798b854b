"""The alarm and the running interval: how often they err, and how soon they see a drift."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from often import assert_at_most

from ojfa_export.bundle.promise import DomainEvidence, Limits, Promise
from ojfa_export.errors import UsageError
from ojfa_export.runtime.confidence_sequence import SLOPES, TILTS, ConfidenceSequence, lower_bound
from ojfa_export.runtime.disagreement import DisagreementMonitor

LIMIT = 0.05


def promise(*domains: str) -> Promise:
    return Promise(
        limits=Limits(max_disagreement=LIMIT),
        policy=None,
        domains=tuple(
            DomainEvidence(
                name=name,
                windows=100,
                tokens=6400,
                disagreement=0.03,
                extra_surprisal=0.1,
                depth=9,
                p_value=0.01,
            )
            for name in domains
        ),
        relative_cost=0.8,
        candidates=3,
        reason="for the test",
    )


Draw = Callable[[np.random.Generator, int], np.ndarray]
AT_THE_LIMIT: dict[str, Draw] = {
    "requests that differ much": lambda rng, n: rng.beta(0.1, 1.9, n),
    "all or nothing": lambda rng, n: (rng.random(n) < LIMIT).astype(float),
    "requests alike": lambda rng, n: rng.beta(10, 190, n),
    "waves within the promise": lambda rng, n: rng.random(n) < LIMIT * (np.arange(n) // 50 % 2),
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_false_alarms_over_a_whole_run(rng: np.random.Generator, name: str) -> None:
    runs, alpha = 200, 0.1
    alarms = sum(
        DisagreementMonitor(promise("all"), alpha).update(AT_THE_LIMIT[name](rng, 600)).alarm
        for _ in range(runs)
    )
    assert_at_most(alpha, alarms, runs, f"false alarms in 600 units, {name}")


def test_what_the_simulation_would_catch(rng: np.random.Generator) -> None:
    """A test that is made once for each unit, with the same level, is no sequential test."""
    runs, alpha, z = 200, 0.1, 1.2816  # the normal distribution's quantile
    alarms = 0
    for _ in range(runs):
        losses = AT_THE_LIMIT["requests alike"](rng, 600)
        n = np.arange(10, 601)
        means = np.cumsum(losses)[9:] / n
        alarms += bool((means > LIMIT + z * losses.std() / np.sqrt(n)).any())
    with pytest.raises(AssertionError, match=r"said: 0\.1"):
        assert_at_most(alpha, alarms, runs, "false alarms of a test made anew for each unit")


def test_domains_share_the_false_alarms(rng: np.random.Generator) -> None:
    runs, alpha, names = 200, 0.1, ("a", "b", "c")
    alarmed = 0
    for _ in range(runs):
        monitor = DisagreementMonitor(promise(*names), alpha)
        for name in names:
            monitor.update(rng.random(150) < LIMIT, name)
        alarmed += bool(monitor.alarms)
    assert_at_most(alpha, alarmed, runs, "runs with a false alarm in any domain")


@pytest.mark.parametrize("before", [0, 2000])
def test_drift_is_seen_soon(rng: np.random.Generator, before: int) -> None:
    """From 3% to 15%, even after a long time in which the promise was kept."""
    delays = []
    for _ in range(20):
        monitor = DisagreementMonitor(promise("all"))
        monitor.update(rng.beta(0.3, 9.7, before))
        assert not monitor.alarms
        state = monitor.update(rng.beta(1.5, 8.5, 1000))
        assert state.alarm_at is not None
        delays.append(state.alarm_at - before)
    print(f"drift after {before} units seen after {np.median(delays):.0f} (median)")
    assert np.median(delays) < 400


def test_alarm_stays(rng: np.random.Generator) -> None:
    monitor = DisagreementMonitor(promise("all"))
    raised = monitor.update(np.ones(100))
    assert raised.alarm
    later = monitor.update(np.zeros(1000))
    assert later.alarm
    assert later.alarm_at == raised.alarm_at
    assert later.units == 1100
    assert monitor.alarms == ["all"]


def test_interval_covers_at_every_moment_under_drift(rng: np.random.Generator) -> None:
    """The average of the true means so far stays inside, while they move and repeat themselves."""
    runs, alpha, units = 200, 0.1, 400
    missed = {"as in the trial of a coin": 0, "alike": 0}
    for _ in range(runs):
        means = 0.05 + 0.04 * np.sin(np.arange(units) / rng.uniform(20, 200))
        averages = np.cumsum(means) / np.arange(1, units + 1)
        for name, losses in (
            ("as in the trial of a coin", rng.random(units) < means),
            ("alike", rng.beta(20 * means, 20 * (1 - means))),
        ):
            sequence = ConfidenceSequence(alpha, guess=0.05)
            outside = False
            for index, loss in enumerate(losses):
                sequence.add(float(loss))
                if index % 40 == 39:
                    lower, upper = sequence.bounds()
                    outside |= not lower <= averages[index] <= upper
            missed[name] += outside
    for name, count in missed.items():
        assert_at_most(alpha, count, runs, f"runs outside the interval, losses {name}")


def test_interval_has_the_promises_confidence(rng: np.random.Generator) -> None:
    losses = rng.beta(1, 19, 50)
    sequence = ConfidenceSequence(1 - 0.95, guess=LIMIT)
    for loss in losses:
        sequence.add(loss)
    for alpha in (0.001, 0.2):  # the alarm's is another
        state = DisagreementMonitor(promise("all"), alpha).update(losses)
        assert (state.lower, state.upper) == pytest.approx(sequence.bounds())


def test_losses_that_vary_little_narrow_the_interval(rng: np.random.Generator) -> None:
    """A hundred tokens in each request are worth more than one."""
    widths = []
    for losses in (rng.random(1000) < 0.05, rng.binomial(100, 0.05, 1000) / 100):
        sequence = ConfidenceSequence(0.05, guess=0.05)
        for loss in losses:
            sequence.add(float(loss))
        lower, upper = sequence.bounds()
        assert lower <= 0.05 <= upper
        widths.append(upper - lower)
    assert widths[1] < widths[0] / 2


def test_interval_narrows_around_the_estimate(rng: np.random.Generator) -> None:
    monitor = DisagreementMonitor(promise("all"), 0.05)
    assert math.isnan(monitor.state().estimate)
    assert (monitor.state().lower, monitor.state().upper) == (0, 1)
    widths = []
    for _ in range(3):
        state = monitor.update(rng.random(2000) < 0.03)
        assert state.lower <= state.estimate <= state.upper
        widths.append(state.upper - state.lower)
    assert widths[2] < widths[0] < 0.05


@pytest.mark.parametrize(
    ("total", "n", "squares"), [(3.5, 40, 1.2), (250.0, 4000, 3.0), (39.9, 40, 0.01)]
)
def test_lower_bound_solves_its_equation(total: float, n: int, squares: float) -> None:
    found = mpmath.mpf(lower_bound(total, n, squares, 0.025))
    parts = [
        mpmath.exp(tilt * total - n * mpmath.log(1 - found + found * mpmath.exp(tilt)))
        for tilt in map(mpmath.mpf, TILTS.tolist())
    ]
    parts += [
        mpmath.exp(slope * (total - n * found) + (mpmath.log(1 - slope) + slope) * squares)
        for slope in map(mpmath.mpf, SLOPES.tolist())
    ]
    assert float(mpmath.fsum(parts) / len(parts) * 0.025) == pytest.approx(1, rel=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1), st.floats(0.001, 0.5))
def test_bounds_are_about_the_mean_and_mirror_each_other(
    losses: list[float], guess: float, alpha: float
) -> None:
    sequence, mirrored = ConfidenceSequence(alpha, guess), ConfidenceSequence(alpha, 1 - guess)
    for loss in losses:
        sequence.add(loss)
        mirrored.add(1 - loss)
    lower, upper = sequence.bounds()
    assert 0 <= lower <= sequence.mean + 1e-12
    assert sequence.mean - 1e-12 <= upper <= 1
    assert mirrored.bounds() == pytest.approx((1 - upper, 1 - lower), abs=1e-9)


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_losses_are_shares(loss: float) -> None:
    with pytest.raises(UsageError, match="a loss is a share between 0 and 1"):
        DisagreementMonitor(promise("all")).update([loss])


@pytest.mark.parametrize("alpha", [0, 1, -1, math.nan])
def test_false_alarm_rate_out_of_range(alpha: float) -> None:
    with pytest.raises(UsageError, match="false-alarm rate must be between 0 and 1"):
        DisagreementMonitor(promise("all"), alpha)


def test_domains_are_the_promises() -> None:
    monitor = DisagreementMonitor(promise("code", "docs"))
    with pytest.raises(UsageError, match="domain 'poems' has no promise") as caught:
        monitor.update([0], "poems")
    assert "code, docs" in str(caught.value.hint)
    assert monitor.update([0.5], "docs").units == 1
    assert monitor.state("code").units == 0


def test_requests_of_unknown_domain_are_watched_by_themselves() -> None:
    monitor = DisagreementMonitor(promise("code", "docs"))
    monitor.update(np.ones(100))
    assert monitor.alarms == [None]
    assert monitor.state("code").units == monitor.state("docs").units == 0
    only = DisagreementMonitor(promise("code"))
    only.update([1])
    assert only.state("code").units == 1
