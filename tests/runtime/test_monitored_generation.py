"""A monitor of generations: what it counts and tests, and what it leaves as it was."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import ojfa_export
from ojfa_export import ExitPolicy, Monitor
from ojfa_export.bundle.promise import DomainEvidence, Limits, Promise
from ojfa_export.decoding.events import ExitTaken, ShadowCheck
from ojfa_export.errors import BundleError, UsageError
from ojfa_export.runtime.disagreement import DisagreementMonitor
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.stats import Stats

PROMPTS = ["def parse(", "class A", "x"]
HALF = ExitPolicy(exits=(2,), measure="top", thresholds=(0.03,))


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return ojfa_export.load(tiny_bundle)


def promise(limit: float, *domains: str) -> Promise:
    evidence = [
        DomainEvidence(name=name, windows=9, tokens=9, disagreement=0, extra_surprisal=0,
                       depth=9, p_value=0.01)
        for name in domains
    ]  # fmt: skip
    return Promise(
        limits=Limits(max_disagreement=limit), policy=HALF, domains=tuple(evidence),
        relative_cost=0.8, candidates=1, reason="for the test",
    )  # fmt: skip


def test_tokens_are_those_without_a_monitor(model):
    for exit_ in (HALF, 2, "full"):
        plain = model.generate(PROMPTS, exit=exit_, max_new_tokens=12)
        monitor = Monitor(0.5, seed=1)
        watched = model.generate(PROMPTS, exit=exit_, max_new_tokens=12, monitor=monitor)
        streamed = model.stream(PROMPTS, exit=exit_, max_new_tokens=12, monitor=monitor)
        assert watched.prompts == plain.prompts
        assert sum(1 for _ in streamed) == sum(len(each.token_ids) for each in plain.prompts)
        assert sum(monitor.stats.exits.values()) == 2 * 36


def test_every_token_checked_gives_the_true_share(model):
    """Share 1: the loss of each request is what a session of full depth says."""
    monitor = Monitor(1.0, DisagreementMonitor(promise(0.5, "all")))
    result = model.generate(PROMPTS, exit=HALF, max_new_tokens=12, monitor=monitor)
    shares = []
    for completion in result.prompts:
        ids = completion.prompt_token_ids + completion.token_ids[:-1]
        [logits] = model.session().advance(ids, every_position=True)
        choices = logits.argmax(axis=1)[len(completion.prompt_token_ids) - 1 :]
        shares.append(np.mean(choices != completion.token_ids))
    assert len(set(shares)) > 1
    state = monitor.disagreement.state()
    assert state.units == 3
    assert state.estimate == pytest.approx(np.mean(shares))


def test_sampled_tokens_are_compared_by_the_likeliest(model):
    """The promise is on the likeliest tokens; those of full depth agree whatever was drawn."""
    monitor = Monitor(1.0, DisagreementMonitor(promise(0.5, "all")))
    model.generate(PROMPTS, exit="full", temperature=2.0, max_new_tokens=12, monitor=monitor)
    assert monitor.disagreement.state().estimate == 0


def test_promises_that_are_broken_raise_the_alarm(model):
    """The tiny model's exits say something else nearly always."""
    monitor = Monitor(0.5, DisagreementMonitor(promise(0.05, "code", "docs")))
    for _ in range(6):
        model.generate(PROMPTS, exit=1, max_new_tokens=12, monitor=monitor, domain="docs")
    assert monitor.disagreement.alarms == ["docs"]
    assert monitor.disagreement.state("code").units == 0
    model.generate(PROMPTS, exit=1, max_new_tokens=12, monitor=monitor)
    assert monitor.disagreement.state().units == 3


def test_what_is_told(model):
    told = []
    monitor = Monitor(1.0, on_event=told.append)
    result = model.generate(PROMPTS, exit=HALF, max_new_tokens=6, monitor=monitor)
    exits = [event for event in told if isinstance(event, ExitTaken)]
    for row, completion in enumerate(result.prompts):
        assert [e.blocks_run for e in exits if e.row == row] == completion.exit_blocks
        sure = [e.confidence[0] >= HALF.thresholds[0] for e in exits if e.row == row]
        assert sure == [blocks == 2 for blocks in completion.exit_blocks]
    checks = [event for event in told if isinstance(event, ShadowCheck)]
    assert len(checks) == 18
    assert monitor.stats.shadow_disagreements == sum(not check.agrees for check in checks)


def test_sessions_that_a_service_embeds(model):
    monitor = Monitor(1.0, DisagreementMonitor(promise(0.5, "all")))
    session = model.session(monitor=monitor)
    logits = session.advance(model.encode("def "), exit=2)
    for _ in range(4):
        logits = session.advance([int(logits[0].argmax())], exit=2)
        assert len(session.run_shadow_checks(1)) == 1
    assert len(session.run_shadow_checks()) == 1
    assert monitor.disagreement.state().units == 0
    monitor.finish(session)
    assert monitor.disagreement.state().units == 1
    assert monitor.stats.exits == {2: 5}
    assert session.stats == Stats()
    monitor.finish(session)  # nothing has happened since
    assert monitor.disagreement.state().units == 1
    session.rewind(0)
    session.advance(model.encode("x"), exit=2)
    monitor.finish(session)
    assert monitor.disagreement.state().units == 2
    assert monitor.stats.exits == {2: 6}


def test_many_threads(model):
    monitor = Monitor(0.5, DisagreementMonitor(promise(0.5, "all")))

    def work() -> None:
        for _ in range(5):
            model.generate("def ", exit=2, max_new_tokens=8, monitor=monitor)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.stats.exits == {2: 160}
    assert 15 <= monitor.disagreement.state().units <= 20  # of 8 tokens none is chosen in 0.4%


def test_choices_differ_between_requests_and_repeat_with_a_seed():
    def chosen(monitor: Monitor) -> list[bool]:
        shadow = monitor.shadow()
        return [shadow.choose() for _ in range(64)]

    monitor = Monitor(0.5, seed=3)
    first, second = chosen(monitor), chosen(monitor)
    assert first != second
    assert chosen(Monitor(0.5, seed=3)) == first
    assert chosen(Monitor(0.5)) != chosen(Monitor(0.5))


def test_stats_add_up():
    total = Stats(checks=2)
    total.exits[2] += 3
    more = Stats(checks=5, shadow_checks=1)
    more.exits.update([2, 4])
    more.count_stopped(2, 2, 1.5)
    total.add(more)
    assert (total.checks, total.shadow_checks, total.exits) == (7, 1, {2: 4, 4: 1})
    assert total.mean_confidence == {2: 0.75}


def test_nothing_to_watch(model):
    with pytest.raises(BundleError, match="has no promise to watch") as caught:
        model.monitor()
    assert "--max-disagreement" in str(caught.value.hint)
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        Monitor(0)
    with pytest.raises(UsageError, match="there is nothing to monitor"):
        model.generate("x", speculate=True, monitor=Monitor(0.5))
    with pytest.raises(UsageError, match="domain 'code' was named"):
        model.generate("x", domain="code")
    monitor = Monitor(0.5, DisagreementMonitor(promise(0.5, "code")))
    with pytest.raises(UsageError, match="domain 'poems' has no promise"):
        model.generate("x", monitor=monitor, domain="poems")
    with pytest.raises(UsageError, match="this session chooses no tokens"):
        monitor.finish(model.session())
