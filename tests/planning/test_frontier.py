"""Expected times and agreements against counting, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_costs import step_costs

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import MAX_DRAFT
from ojfa_export.planning.frontier import (
    agreement_runs,
    as_speculation,
    fixed_exits,
    policy_point,
    round_ms,
    speculation,
)
from ojfa_export.promises.outcomes import depths_of
from ojfa_export.promises.statistics import ExitStatistics

Make = Callable[..., ExitStatistics]
POLICY = ExitPolicy(exits=(3, 6, 9), measure="margin", thresholds=(0.7, 0.6, 0.8))
# A window's first token has nothing before it, its last ones nothing after: one in 3,000.
EDGES = 2e-3


def replay(depths: np.ndarray, policy: ExitPolicy, blocks: int, untimed: int = 0) -> float:
    """Milliseconds per token of one sequence, with a watermark for each block."""
    marks, total = [0] * blocks, 0.0
    for position, depth in enumerate(depths.tolist()):
        checks = sum(exit <= depth for exit in policy.exits)
        total = total if position > untimed else 0.0
        total += 0.1 + 0.2 * checks + (0.4 if depth == blocks else 0)
        for block in range(depth):
            waiting = position - marks[block]
            total += 1 + 0.5 * (waiting > 0) + 0.25 * waiting
            marks[block] = position + 1
    return total / (len(depths) - untimed)


def test_policies_against_replayed_sequences(make_statistics: Make) -> None:
    statistics = make_statistics(windows=4, tokens=3000, run=3000)
    found = policy_point(POLICY, statistics, step_costs())
    depths = depths_of(statistics, POLICY)
    assert 4 < depths.mean() < 11, "both waiting and going on are put to the test"
    expected = np.mean([replay(window, POLICY, 12) for window in depths])
    assert found.ms == pytest.approx(expected, rel=EDGES)
    assert found.blocks == pytest.approx(depths.mean())
    columns = np.minimum(depths, 11) - 1
    differs = ~np.take_along_axis(statistics.agrees, columns[..., None], axis=2)[..., 0]
    differs &= depths < 12
    assert found.agreement == pytest.approx(1 - differs.mean())
    worst = max(differs[statistics.domain == domain].mean() for domain in (0, 1))
    assert found.worst_agreement == pytest.approx(1 - worst)


def test_depths_are_those_of_the_first_exit_that_is_sure(make_statistics: Make) -> None:
    statistics = make_statistics(windows=3, tokens=16)
    found = depths_of(statistics, POLICY)
    for window, token in np.ndindex(*found.shape):
        sure = [
            exit
            for exit, threshold in zip(POLICY.exits, POLICY.thresholds, strict=True)
            if float(statistics.of("margin")[window, token, exit - 1]) >= threshold
        ]
        assert found[window, token] == min([*sure, 12])


def test_short_runs_tell_nearly_as_much(make_statistics: Make) -> None:
    whole = make_statistics(windows=60, tokens=1024, run=1024, mixing=0.8)
    one = policy_point(POLICY, whole, step_costs()).ms
    runs = policy_point(POLICY, replace(whole, run=8), step_costs()).ms
    alone = policy_point(POLICY, replace(whole, run=1), step_costs()).ms
    assert abs(runs - one) < 0.01 * one  # the pairs that are not looked at are an eighth
    assert alone > one, "neighbours are alike: without knowing it, more blocks seem to catch up"


def test_fixed_exits_are_what_was_measured(make_statistics: Make) -> None:
    statistics, costs = make_statistics(), step_costs()
    points = fixed_exits(statistics, costs)
    assert [point.ms for point in points] == list(costs.exits)
    assert [point.blocks for point in points] == list(range(1, 13))
    for column, point in enumerate(points[:-1]):
        assert point.agreement == pytest.approx(statistics.agrees[..., column].mean())
    assert (points[-1].kind, points[-1].agreement) == ("full", 1)


def test_nobody_leaves_and_everybody_leaves(make_statistics: Make) -> None:
    statistics, costs = make_statistics(), step_costs()
    never = ExitPolicy(exits=(4, 8), measure="top", thresholds=(2.0, 2.0))
    assert policy_point(never, statistics, costs).ms == pytest.approx(costs.full + 2 * 0.2)
    always = ExitPolicy(exits=(4, 8), measure="top", thresholds=(-1.0, -1.0))
    assert policy_point(always, statistics, costs).ms == pytest.approx(costs.exits[3])


@given(catch_up=st.floats(0, 3), waiting=st.floats(0, 3), check=st.floats(0, 3))
def test_dearer_work_never_makes_a_token_cheaper(
    catch_up: float, waiting: float, check: float
) -> None:
    statistics = SHARED
    checks = dict.fromkeys(("top", "margin", "entropy"), check)
    free = step_costs(catch_up=0, waiting=0, checks=dict.fromkeys(checks, 0.0))
    dear = step_costs(catch_up=catch_up, waiting=waiting, checks=checks)
    assert policy_point(POLICY, statistics, dear).ms >= policy_point(POLICY, statistics, free).ms
    for one, other in zip(
        speculation(statistics, dear), speculation(statistics, free), strict=True
    ):
        assert one.ms >= other.ms


def count_runs(agrees: np.ndarray, length: int) -> float:
    """The share of places in runs [runs, run] from which `length` tokens agree."""
    places = [
        all(row[start : start + length])
        for row in agrees.tolist()
        for start in range(len(row) - length + 1)
    ]
    return sum(places) / len(places)


def test_runs_of_agreement_are_counted(make_statistics: Make) -> None:
    statistics = make_statistics(windows=6, tokens=24, run=6)
    for column in range(11):
        found = agreement_runs(statistics, column, 6)
        runs = statistics.agrees[..., column].reshape(-1, 6)
        expected = [count_runs(runs, length) for length in range(1, 7)]
        np.testing.assert_allclose(found, expected)
        # Beyond a run, a window's tokens agree as often as its others.
        own = statistics.agrees[..., column].mean(axis=1)
        whole = runs.all(axis=1).reshape(6, -1).mean(axis=1)
        np.testing.assert_allclose(
            agreement_runs(statistics, column, 8)[6:],
            [(whole * own).mean(), (whole * own**2).mean()],
        )
    alone = replace(statistics, run=1)
    np.testing.assert_allclose(
        agreement_runs(alone, 3, 3),
        [(alone.agrees[..., 3].mean(axis=1) ** power).mean() for power in (1, 2, 3)],
    )


def test_speculation_against_rounds_one_after_the_other(rng: np.random.Generator) -> None:
    """On independent tokens, where it doesn't matter where a round begins."""
    share, length = 0.8, 60_000
    agrees = rng.random((1, length, 11)) < share
    statistics = ExitStatistics(
        12, tuple(range(1, 12)), ("d",), np.zeros(1, np.int16),
        np.zeros((3, *agrees.shape), np.float16), agrees, np.zeros(agrees.shape, np.float16),
        run=length,
    )  # fmt: skip
    costs = step_costs()
    points = {(p.exit, p.draft): p for p in speculation(statistics, costs)}
    for exit, draft in itertools.product((3, 11), (1, 4, MAX_DRAFT)):
        at, ms = 0, 0.0
        while at + draft < length:
            taken = agrees[0, at : at + draft, exit - 1]
            accepted = draft if taken.all() else int(taken.argmin())
            # Drafts; the last one's first blocks; the others' and its remaining ones; the head.
            ms += draft * costs.exits[exit - 1] + 0.1 + exit
            ms += (12 - exit) * (1 + 0.5 + 0.25 * draft) + 0.4 + 0.1 * draft
            at += accepted + 1
        # Some 15,000 rounds, whose lengths vary by 3 at most.
        assert points[exit, draft].ms == pytest.approx(ms / at, rel=0.03)
        assert points[exit, draft].agreement == 1


def test_speculation_draws_on_the_same_costs_at_run_time(make_statistics: Make) -> None:
    statistics, costs = make_statistics(), step_costs()
    for point in speculation(statistics, costs):
        made = as_speculation(point, statistics, costs)
        assert made.draft is None
        assert made.draft_cost is not None
        assert point.draft is not None
        relative = 1 + made.round_cost + point.draft * (made.draft_cost + made.check_cost)
        assert relative * costs.full == pytest.approx(round_ms(costs, point.exit or 0, point.draft))
        assert made.acceptance == pytest.approx(
            statistics.agrees[..., (point.exit or 0) - 1].mean()
        )


def _shared() -> ExitStatistics:
    rng = np.random.default_rng(0)
    agrees = rng.random((8, 64, 11)) < np.linspace(0.3, 0.9, 11)
    sure = rng.random((3, 8, 64, 11)).astype(np.float16)
    extra = np.zeros(agrees.shape, np.float16)
    return ExitStatistics(
        12, tuple(range(1, 12)), ("d",), np.zeros(8, np.int16), sure, agrees, extra, run=8
    )


SHARED = _shared()


@given(late=st.floats(0, 3), waited=st.integers(0, 8))
def test_a_pass_costs_most_beyond_its_blocks_where_it_is_one_block(
    late: float, waited: int
) -> None:
    costs = step_costs(late_pass=late)
    beyond = [costs.catching_up(b, waited) - b * (0.5 + 0.25 * waited) for b in range(1, 12)]
    np.testing.assert_allclose(beyond[0], late, atol=1e-9)
    np.testing.assert_allclose(beyond[5:], 0, atol=1e-9)  # half of twelve blocks, and more
    assert all(np.diff(beyond) <= 1e-9)
