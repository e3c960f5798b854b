"""From chosen tokens to alarms, on the demo checkpoint's real exits: how often they err.

Requests are windows of text drawn from a population whose disagreement under a policy is known.
Their tokens are chosen as a session chooses them; the choice and the monitor are the ones that run
in production.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from often import assert_at_most

from ojfa_export.bundle.promise import DomainEvidence, Limits, Promise
from ojfa_export.decoding.events import ShadowCheck
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.outcomes import Costs, apply
from ojfa_export.promises.statistics import ExitStatistics, load_statistics
from ojfa_export.runtime.disagreement import DisagreementMonitor
from ojfa_export.runtime.shadow import PendingCheck, Shadow

POLICY = ExitPolicy(exits=(4, 8), measure="entropy", thresholds=(-0.7, -0.5))
SHARE = 0.25  # of the 16 tokens of a window


@pytest.fixture(scope="module")
def text() -> ExitStatistics:
    path = Path(__file__).with_name("demo_statistics.npz")
    return load_statistics(path)["certification"]


def early_and_differs(text: ExitStatistics) -> tuple[np.ndarray, np.ndarray]:
    """[windows, tokens] whether a token stops early, and whether it then differs."""
    early, differs = np.zeros((2, *text.agrees.shape[:2]), np.bool_)
    for depth, threshold in zip(POLICY.exits, POLICY.thresholds, strict=True):
        column = text.exits.index(depth)
        leaves = ~early & (text.of(POLICY.measure)[..., column] >= threshold)
        early |= leaves
        differs |= leaves & ~text.agrees[..., column]
    return early, differs


def watching(limit: float, alpha: float) -> DisagreementMonitor:
    evidence = DomainEvidence(name="all", windows=1, tokens=1, disagreement=0, extra_surprisal=0,
                              depth=9, p_value=0.01)  # fmt: skip
    return DisagreementMonitor(
        Promise(limits=Limits(max_disagreement=limit), policy=POLICY, domains=(evidence,),
                relative_cost=1, candidates=1, reason="for the test"),
        alpha,
    )  # fmt: skip


def loss_of(early: np.ndarray, differs: np.ndarray, rng: np.random.Generator) -> float | None:
    """What a session would have found of one request."""
    shadow = Shadow(SHARE, rng)
    for position, stops in enumerate(early):
        if shadow.choose():
            if stops:
                shadow.add(PendingCheck(0, position, 4, 0))
            else:
                shadow.record(ShadowCheck(0, position, 12, True))
    for due in shadow.due:
        agrees = not differs[due.position]
        shadow.record(ShadowCheck(0, due.position, due.blocks_run, agrees))
    return shadow.loss(0)


def test_losses_of_chosen_tokens_are_unbiased(
    text: ExitStatistics, rng: np.random.Generator
) -> None:
    early, differs = early_and_differs(text)
    outcome = apply(text, POLICY, Costs.even(12, 1, 0.1, 0.3), 10)
    np.testing.assert_allclose(differs.mean(axis=1), outcome.disagreement)
    rows = np.flatnonzero(differs.any(axis=1))[:5]
    for row in rows:
        losses = [loss_of(early[row], differs[row], rng) for _ in range(3000)]
        known = [loss for loss in losses if loss is not None]
        error = np.std(known) / len(known) ** 0.5
        assert abs(np.mean(known) - differs[row].mean()) < 5 * error  # five standard errors


def test_false_alarms_with_shadow_checks(text: ExitStatistics, rng: np.random.Generator) -> None:
    """The promise is the very disagreement of the traffic: no lower one would be kept."""
    early, differs = early_and_differs(text)
    limit = float(differs.mean())
    assert 0.01 < limit < 0.3
    runs, alpha, alarms, outside = 200, 0.1, 0, 0
    for _ in range(runs):
        monitor = watching(limit, alpha)
        rows = rng.integers(text.windows, size=200)
        losses = [loss_of(early[row], differs[row], rng) for row in rows]
        state = monitor.update(loss for loss in losses if loss is not None)
        alarms += state.alarm
        outside += not state.lower <= limit <= state.upper
    assert_at_most(alpha, alarms, runs, "false alarms with shadow checks")
    assert_at_most(0.05, outside, runs, "intervals that miss the truth")


def test_drift_is_detected_with_shadow_checks(
    text: ExitStatistics, rng: np.random.Generator
) -> None:
    """After 200 requests as promised, only the windows that differ twice as much and more."""
    early, differs = early_and_differs(text)
    shares = differs.mean(axis=1)
    hard = np.flatnonzero(shares >= 2 * shares.mean())
    delays = []
    for _ in range(30):
        monitor = watching(float(shares.mean()), 0.01)
        rows = np.concatenate([rng.integers(text.windows, size=200), rng.choice(hard, 400)])
        losses = [loss_of(early[row], differs[row], rng) for row in rows]
        state = monitor.update(loss for loss in losses if loss is not None)
        delays.append(state.alarm_at - 200 if state.alarm_at else np.inf)
    print(f"drift seen after {np.median(delays):.0f} requests (median of {sorted(delays)})")
    assert np.median(delays) < 200
    assert sum(np.isfinite(delays)) >= 28
