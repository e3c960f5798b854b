"""What is recommended: never worse than full depth, and never less than what was asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_costs import step_costs

from ojfa_export.decoding.default import Default
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.planning.frontier import policies
from ojfa_export.planning.picture import frontier
from ojfa_export.planning.plan import make_plan, plan_default
from ojfa_export.planning.recommend import MARGIN
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.statistics import ExitStatistics
from ojfa_export.system.progress import SILENT

Make = Callable[..., ExitStatistics]
ALWAYS = ExitPolicy(exits=(3,), measure="top", thresholds=(0.0,))


def agreeing(share: float, windows: int = 6) -> dict[str, ExitStatistics]:
    """Exits that agree so often, and know nothing of when."""
    rng = np.random.default_rng(1)
    agrees = rng.random((windows, 64, 11)) < share
    sure = rng.random((3, windows, 64, 11)).astype(np.float16)
    found = ExitStatistics(
        12, tuple(range(1, 12)), ("d",), np.zeros(windows, np.int16), sure, agrees,
        np.zeros(agrees.shape, np.float16), run=8,
    )  # fmt: skip
    return {"tuning": found, "certification": found}


@given(
    share=st.floats(0, 1),
    catch_up=st.floats(0, 2),
    waiting=st.floats(0, 1),
    policy=st.sampled_from([None, ALWAYS]),
)
def test_the_default_saves_time_or_is_full_depth(
    share: float, catch_up: float, waiting: float, policy: ExitPolicy | None
) -> None:
    costs = step_costs(catch_up=catch_up, waiting=waiting)
    found = plan_default(agreeing(share), costs, policy)
    assert found.full_ms_per_token == costs.full
    if found.exit == "full" and found.speculation is None:
        assert found.ms_per_token == costs.full
    else:
        assert found.ms_per_token <= (1 - MARGIN) * costs.full
    # Without a promise, only what gives the tokens of full depth.
    assert policy is not None or found.exit == "full"
    assert Default.model_validate_json(found.model_dump_json()) == found


@given(
    share=st.floats(0, 1),
    catch_up=st.floats(0, 2),
    waiting=st.floats(0, 1),
    final_row=st.floats(0, 1),
)
def test_what_pays_for_nothing_else_is_no_default_with_all_costs(
    share: float, catch_up: float, waiting: float, final_row: float
) -> None:
    costs = step_costs(catch_up=catch_up, waiting=waiting, final_row=final_row)
    splits, steps = agreeing(share), StepCosts.of_steps(costs.exits)
    most = plan_default(splits, steps, None)
    found = plan_default(splits, costs, None)
    assert most.ms_per_token <= found.ms_per_token
    if most.speculation is None:
        assert found == most


def test_drafts_are_the_default_where_they_are_nearly_always_right() -> None:
    cheap = step_costs(catch_up=0.01, waiting=0.01, final_row=0.01)
    found = plan_default(agreeing(0.98), cheap, None)
    assert found.speculation is not None
    assert found.speculation.exit == 1
    assert found.speculation.acceptance == pytest.approx(0.98, abs=0.05)
    never = plan_default(agreeing(0.1), cheap, None)
    assert never.speculation is None
    assert never.reason.startswith("full depth")


def test_a_promise_beats_drafts_only_by_a_margin() -> None:
    dear = step_costs(catch_up=2.0, waiting=2.0)
    assert plan_default(agreeing(0.98), dear, ALWAYS).exit == "auto"
    drafting = step_costs(
        exits=[4.0] * 11 + [12.5], catch_up=0, waiting=0, final_row=0,
        checks=dict.fromkeys(("top", "margin", "entropy"), 0.2),
    )  # fmt: skip
    # A draft costs as much as a step at the exit, so that the exit alone is much faster...
    assert plan_default(agreeing(1.0), drafting, ALWAYS).exit == "auto"
    # ... unless drafting it costs next to nothing.
    free = drafting.model_copy(update={"exits": (0.3, *[4.0] * 10, 12.5)})
    assert plan_default(agreeing(1.0), free, ALWAYS).speculation is not None


def test_plan_says_when_early_exit_is_not_worth_it(make_statistics: Make) -> None:
    statistics = make_statistics(windows=24)
    splits = {
        "tuning": statistics.select(np.arange(8)),
        "certification": statistics.select(np.arange(8, 24)),
    }
    dear = make_plan(splits, step_costs(catch_up=5.0, waiting=3.0), None, 0.95)
    assert dear.advice[0].startswith("Early exit is not worth it on this model")
    assert dear.own is None
    assert (dear.windows, dear.tokens) == (16, 1024)
    names = [point.name for point in dear.points]
    assert len(set(names)) == len(names) >= 12 + 11 * 8
    right = make_plan(agreeing(1.0), step_costs(catch_up=0, waiting=0), ALWAYS, 0.95)
    assert right.advice[0] == "Early exit pays on this model and machine."
    assert right.own is not None
    assert right.own.agreement == 1
    assert frontier(right.points, right.own).startswith(b"\x89PNG")


@pytest.mark.parametrize("certified", [(4, 8), ()])
def test_plans_of_what_few_exits_were_certified_on(
    make_statistics: Make, certified: tuple[int, ...]
) -> None:
    statistics = make_statistics(windows=120)
    tuning, rest = statistics.select(np.arange(40)), statistics.select(np.arange(40, 120))
    kept = rest.at(certified) if certified else rest.at(()).select(np.arange(0))
    costs = step_costs(catch_up=0.0, waiting=0.0)
    own = None if not certified else ExitPolicy(exits=(4,), measure="top", thresholds=(0.9,))
    found = make_plan({"tuning": tuning, "certification": kept}, costs, own, 0.95)
    # Fixed exits and drafts are of the tuning text, the only one on which every exit was asked.
    assert (found.windows, found.tokens) == (40, 40 * 64)
    fixed = [point for point in found.points if point.kind == "fixed"]
    assert [point.exit for point in fixed] == list(range(1, 12))
    for point in fixed:
        assert point.agreement == pytest.approx(tuning.agrees[..., (point.exit or 0) - 1].mean())
    auto = [point for point in found.points if point.kind == "auto"]
    assert auto
    for point in auto:
        assert point.policy is not None
        if set(point.policy.exits) <= set(certified):
            assert (point.windows, point.tokens) == (80, 80 * 64)
        else:
            assert (point.windows, point.certified) == (40, False)
    if own is not None:
        whole = make_plan({"tuning": tuning, "certification": rest}, costs, own, 0.95)
        assert found.own == whole.own
    else:
        assert not any(point.certified for point in auto)


def test_policies_keep_what_they_were_chosen_for(make_statistics: Make) -> None:
    statistics = make_statistics(windows=400)
    splits = {
        "tuning": statistics.select(np.arange(100)),
        "certification": statistics.select(np.arange(100, 400)),
    }
    free = step_costs(
        catch_up=0.0, waiting=0.0, checks=dict.fromkeys(("top", "margin", "entropy"), 0)
    )
    found = policies(splits, free, 0.95, SILENT, (0.05, 0.1, 0.2))
    assert [point.limit for point in found] == [0.05, 0.1, 0.2]
    assert all(point.certified for point in found)
    assert [point.ms for point in found] == sorted((p.ms for p in found), reverse=True)
    for point in found:
        assert point.limit is not None
        assert 1 - point.worst_agreement <= point.limit
    # 8 windows without a loss are too few for 20%: 1 / 0.8 ** 8 is below 1 / 0.05.
    few = {name: split.select(np.arange(8)) for name, split in splits.items()}
    estimates = policies(few, free, 0.95, SILENT, (0.05, 0.2))
    assert [point.certified for point in estimates] == [False, False]
