"""The alarm and the running interval: how often they err, and how soon they see a drift."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest

from ojfa_export.errors import UsageError
from ojfa_export.guarantee import DisagreementMonitor, DomainEvidence, Limits, Promise
from ojfa_export.guarantee.monitor import _TILTS, _lower_bound

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


def allowed(rate: float, runs: int) -> float:
    return rate + 5 * math.sqrt(rate * (1 - rate) / runs)


Draw = Callable[[np.random.Generator, int], np.ndarray]
AT_THE_LIMIT: dict[str, Draw] = {
    "requests that differ much": lambda rng, n: rng.beta(0.1, 1.9, n),
    "all or nothing": lambda rng, n: (rng.random(n) < LIMIT).astype(float),
    "requests alike": lambda rng, n: rng.beta(10, 190, n),
    "waves within the promise": lambda rng, n: rng.random(n) < LIMIT * (np.arange(n) // 50 % 2),
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_false_alarms_over_a_whole_run(rng: np.random.Generator, name: str) -> None:
    runs, alpha = 120, 0.1
    alarms = sum(
        DisagreementMonitor(promise("all"), alpha).update(AT_THE_LIMIT[name](rng, 1000)).alarm
        for _ in range(runs)
    )
    print(f"{name}: {alarms} false alarms in {runs} runs of 1000 units, promised {alpha:.0%}")
    assert alarms / runs <= allowed(alpha, runs)


def test_domains_share_the_false_alarms(rng: np.random.Generator) -> None:
    runs, alpha, names = 60, 0.1, ("a", "b", "c")
    alarmed = 0
    for _ in range(runs):
        monitor = DisagreementMonitor(promise(*names), alpha)
        for name in names:
            monitor.update(rng.beta(0.5, 9.5, 500), name)
        alarmed += bool(monitor.alarms)
    assert alarmed / runs <= allowed(alpha, runs)


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
    runs, alpha, units = 60, 0.1, 600
    missed = 0
    for _ in range(runs):
        means = 0.05 + 0.04 * np.sin(np.arange(units) / rng.uniform(20, 200))
        losses = rng.random(units) < means
        monitor = DisagreementMonitor(promise("all"), alpha)
        averages = np.cumsum(means) / np.arange(1, units + 1)
        outside = False
        for start in range(0, units, 10):
            state = monitor.update(losses[start : start + 10])
            outside |= not state.lower <= averages[start + 9] <= state.upper
        missed += outside
    assert missed / runs <= allowed(alpha, runs)


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


@pytest.mark.parametrize(("total", "n"), [(3.5, 40), (250.0, 4000), (39.9, 40)])
def test_lower_bound_solves_its_equation(total: float, n: int) -> None:
    bound, alpha = mpmath.mpf(_lower_bound(total, n, 0.025)), mpmath.mpf("0.025")
    mixture = mpmath.fsum(
        mpmath.exp(tilt * total - n * mpmath.log(1 - bound + bound * mpmath.exp(tilt)))
        for tilt in map(mpmath.mpf, _TILTS.tolist())
    ) / len(_TILTS)
    assert float(mixture * alpha) == pytest.approx(1, rel=1e-6)


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
