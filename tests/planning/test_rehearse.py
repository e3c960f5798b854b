"""Rehearsals with a clock that moves only with the engines' work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_costs import ClockedEngines, step_costs

import ojfa_export
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.planning.frontier import fixed_exits, policy_point, round_ms, speculation
from ojfa_export.planning.rehearse import DRAFTING_EXITS, ROOM, rehearse, time_points
from ojfa_export.planning.turns import SETTLING, Turns
from ojfa_export.promises.outcomes import apply, depths_of
from ojfa_export.promises.statistics import ExitStatistics
from ojfa_export.system.progress import SILENT

Make = Callable[..., ExitStatistics]
POLICY = ExitPolicy(exits=(1, 3), measure="margin", thresholds=(0.4, 0.5))


@pytest.fixture
def turns(tiny_bundle: Path) -> Turns:
    model = ojfa_export.load(tiny_bundle)
    engines = ClockedEngines(model.engines)
    return Turns(model.spec, engines, model.manifest.cache.max_length, ROOM, clock=engines.clock)


def rehearsed_ms(depths: list[int], policy: ExitPolicy, turns: Turns) -> float:
    """Milliseconds per token of steps that stop at these depths, in a cache as short as this one.

    The last steps come first, and when the cache is full all in it is dropped.
    """
    session = turns.session
    marks, position, taken = [0] * session.spec.blocks, 0, []
    for depth in [*depths[-SETTLING:], *depths]:
        if position + ROOM > session.max_length:
            marks, position = [0] * session.spec.blocks, 0
        ms = 0.1 + 0.2 * sum(exit <= depth for exit in policy.exits)
        ms += 0.4 if depth == session.spec.blocks else 0
        for block in range(depth):
            waiting = position - marks[block]
            ms += 1 + 0.5 * (waiting > 0) + 0.25 * waiting
            marks[block] = position + 1
        taken.append(ms)
        position += 1
    return float(np.mean(taken[SETTLING:]))


def test_a_policy_takes_what_its_depths_take(make_statistics: Make, turns: Turns) -> None:
    made = (make_statistics(windows=3, tokens=64, run=64, blocks=4) for _ in range(20))
    # Such that every exit is taken, by which there is more than one way to be wrong.
    statistics = next(each for each in made if len(np.unique(depths_of(each, POLICY))) == 3)
    depths, costs = depths_of(statistics, POLICY), step_costs(4)
    point = policy_point(POLICY, statistics, costs)
    found = time_points([point], statistics, costs, turns, 1e9, SILENT)[point]
    # All tokens are rehearsed, so that there is nothing to carry over to others.
    assert found.ms == pytest.approx(rehearsed_ms(depths.ravel().tolist(), POLICY, turns))
    assert replace(found, ms=0.0) == replace(point, ms=0.0)


def test_what_few_tokens_take_is_carried_over_to_all(make_statistics: Make, turns: Turns) -> None:
    statistics, costs = make_statistics(windows=40, blocks=4), step_costs(4)
    point = policy_point(POLICY, statistics, costs)
    few = replace(statistics.select(np.array([0])), confidence=statistics.confidence[:, :1, :8],
                  agrees=statistics.agrees[:1, :8],
                  extra_surprisal=statistics.extra_surprisal[:1, :8])  # fmt: skip
    # There is time for the first run of 8 neighbours only.
    found = time_points([point], statistics, costs, turns, 1e-9, SILENT)[point]
    expected = float(apply(few, POLICY, costs.of_policies(), surprisal_clip=1.0).cost.mean())
    taken = rehearsed_ms(depths_of(few, POLICY).ravel().tolist(), POLICY, turns)
    assert found.ms == pytest.approx(point.ms * taken / expected)


def test_drafts_are_timed_and_the_others_corrected(make_statistics: Make, turns: Turns) -> None:
    statistics, costs = make_statistics(blocks=4), step_costs(4)
    true = {(p.exit, p.draft): p for p in speculation(statistics, costs)}
    cheap = step_costs(4, catch_up=0.1, waiting=0.1)  # which is less than the engines take
    points = fixed_exits(statistics, cheap) + speculation(statistics, cheap)
    found = rehearse(points, statistics, cheap, turns, 1e9, SILENT)
    assert found[:4] == points[:4]
    exact = [
        point for point in found[4:] if point.ms == pytest.approx(true[point.exit, point.draft].ms)
    ]
    assert len({point.exit for point in exact}) == DRAFTING_EXITS
    for before, after in zip(points[4:], found[4:], strict=True):
        assert after.ms > before.ms
    for exit, draft in ((1, 2), (3, 1)):
        [point] = (p for p in points if (p.exit, p.draft) == (exit, draft))
        timed = time_points([point], statistics, cheap, turns, 1e9, SILENT)[point]
        tokens = round_ms(costs, exit, draft) / true[exit, draft].ms
        assert timed.ms == pytest.approx(round_ms(costs, exit, draft) / tokens)


def test_a_machine_that_was_slower_when_costs_were_measured(
    make_statistics: Make, turns: Turns
) -> None:
    """What drafts take is told by full depth at the same time, not by what that took before."""
    statistics, costs = make_statistics(blocks=4), step_costs(4)
    points = [*fixed_exits(statistics, costs), *speculation(statistics, costs)]
    expected = rehearse(points, statistics, costs, turns, 1e9, SILENT)
    before = [replace(point, ms=2 * point.ms) for point in points]
    found = rehearse(before, statistics, costs, turns, 1e9, SILENT)
    for one, other in zip(expected, found, strict=True):
        assert other.ms == pytest.approx(2 * one.ms), one.name


def test_nothing_to_rehearse(make_statistics: Make, turns: Turns) -> None:
    points = fixed_exits(make_statistics(blocks=4), step_costs(4))
    assert rehearse(points, make_statistics(blocks=4), step_costs(4), turns, 1.0, SILENT) == points
