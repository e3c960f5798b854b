"""The simulation of machines: nothing is lost, and times are those of the table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.serving.pass_times import FILLED, STEPS, Load, PassTimes
from bench.serving.routing import (
    AtRandom,
    ByDepth,
    ByPrefix,
    FewestRequests,
    LeastLoaded,
    Limits,
    TwoChoices,
    goodput,
    high,
    serve,
)
from bench.serving.scaling import arrivals, capacity_of
from bench.serving.simulated import PREFIX, Asked, Machine, served

ROUTERS = [AtRandom, TwoChoices, FewestRequests, LeastLoaded, lambda: ByDepth(1), ByPrefix]


@given(
    rate=st.sampled_from([3.0, 30.0, 300.0]),
    shallow=st.sampled_from([0.0, 0.5, 1.0]),
    prefixed=st.sampled_from([0.0, 0.7]),
    router=st.sampled_from(ROUTERS),
    machines=st.integers(2, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_every_request_ends_with_all_its_tokens(rate, shallow, prefixed, router, machines, seed):
    asked = arrivals(rate, 60 / rate, seed, shallow, prefixed, prefixes=3)
    done = serve(asked, machines, router(), PassTimes())
    assert sum(each.generated for each in done) == sum(each.tokens for each in asked)
    assert [machine.load for machine in done] == [machine.requests for machine in done]
    assert {machine.load for machine in done} == {0}
    for each in asked:
        got = served(each, np.array(done[each.machine].ends))
        assert each.left == 0
        assert len(got.between) == each.tokens - 1
        assert got.first > 0
        assert (got.between > 0).all()


@pytest.mark.parametrize("requests", sorted(STEPS))
def test_time_per_token_is_that_of_the_step(requests):
    machine = Machine(PassTimes(context_us=0.0))
    asked = [Asked(0.0, 512, 600) for _ in range(requests)]
    for each in asked:
        machine.submit(each)
    machine.advance()
    ends = np.array(machine.ends)
    last = max(each.first for each in asked)
    steps = 1e3 * np.diff(ends[last:][:10])
    assert steps == pytest.approx(STEPS[requests])


def test_half_depth_takes_half_of_the_blocks():
    times = PassTimes(context_us=0.0)
    assert times.of_pass(Load(shallow=16)) == pytest.approx(STEPS[16] / 2)
    mixed = times.of_pass(Load(full=16, shallow=16))
    assert mixed == pytest.approx((STEPS[32] + STEPS[16]) / 2)


@pytest.mark.parametrize(("size", "few"), [(size, few) for size, (few, _) in FILLED.items()])
def test_passes_with_pieces_take_what_was_measured(size, few):
    assert PassTimes().all_blocks(16, size - 16) == pytest.approx(few)


def test_longer_contexts_take_longer():
    short, long = (PassTimes().of_pass(Load(full=8, context=8 * each)) for each in (566, 1000))
    assert short == pytest.approx(STEPS[4] + (STEPS[16] - STEPS[4]) / 3)
    assert long > short


def test_more_machines_give_more():
    """Over several loads: of one a few requests may come late by chance, as times are spread."""
    goods = []
    for count in (1, 2, 4):
        shares = []
        for seed in range(4):
            asked = arrivals(30.0, 4.0, seed, 0.5)
            done = serve(asked, count, LeastLoaded(), PassTimes())
            shares.append(goodput(asked, done, (0.0, 4.0), Limits()).share)
        goods.append(sum(shares) / len(shares))
    assert goods[0] < goods[1] < goods[2] + 0.02
    assert goods[2] > 0.9


def test_a_known_prefix_is_not_computed_again():
    asked = [Asked(float(at), PREFIX + 100, 4, prefix=1) for at in range(3)]
    (machine,) = serve(asked, 1, ByPrefix(), PassTimes())
    assert [each.cached for each in asked] == [0, PREFIX, PREFIX]
    assert len(machine.ends) == 12


def test_requests_at_half_depth_have_machines_of_their_own():
    asked = arrivals(40.0, 2.0, 3, shallow=0.5)
    serve(asked, 4, ByDepth(1), PassTimes())
    assert {each.machine for each in asked if each.shallow} == {0}
    assert 0 not in {each.machine for each in asked if not each.shallow}


def test_the_quantile_is_numpys():
    samples = np.random.default_rng(0).random(77)
    assert high(samples) == pytest.approx(np.percentile(samples, 99))


def test_capacity_lies_where_too_few_keep_the_limits():
    asked = arrivals(5.0, 4.0, 0)
    done = serve(asked, 1, LeastLoaded(), PassTimes())
    got = goodput(asked, done, (0.0, 4.0), Limits())
    curve = [got._replace(rate=10.0, good=good) for good in (10.0, 9.0)]
    assert capacity_of([10, 20], curve) == pytest.approx(15.0)
    assert capacity_of([10], curve[:1]) is None
    assert capacity_of([20], curve[1:]) is None
