"""The engine on a device, where a pass begins before the one before it has been handed out."""

from __future__ import annotations

import time

import pytest
from engine.random_requests import (
    TIMEOUT,
    alone,
    check_each_gives_what_it_gives_alone,
    requests,
)
from engine.watched_engine import WatchedEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.errors import BackendError, OjfaError

examples = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@examples
@given(requests=requests, slots=st.integers(1, 4), pages=st.sampled_from([3, 100]))
def test_requests_give_the_tokens_of_each_alone(on_device, requests, slots, pages):
    check_each_gives_what_it_gives_alone(
        on_device.model, on_device.reference, requests, slots, pages
    )


@pytest.mark.parametrize(
    "samplings",
    [
        [{}] * 3,
        [{"temperature": 0.9, "top_k": 50}] * 3,
        [{"temperature": 0.9}, {}, {"temperature": 1.4, "top_p": 0.8}],
    ],
    ids=["greedy", "sampled", "each otherwise"],
)
def test_passes_begin_before_the_tokens_before_them_are_known(llama_on_device, samplings):
    """All but the first."""
    model, reference = llama_on_device.model, llama_on_device.reference
    prompts = [[1, 2, 3], [4, 5], [6]]
    options = [
        {"max_new_tokens": 20 + 10 * at, "seed": at, "ignore_eos": True, **samplings[at]}
        for at in range(3)
    ]
    with WatchedEngine(model, max_sequences=3) as engine:
        with engine._admission.changed:
            running = [
                engine.submit(prompt, **each) for prompt, each in zip(prompts, options, strict=True)
            ]
        results = [each.result(TIMEOUT) for each in running]
    assert engine.passes == 40
    assert engine.ahead == 39
    assert engine.unseen == 39  # also where a request ends, and the others go on
    for prompt, each, result in zip(prompts, options, results, strict=True):
        assert result.token_ids == alone(reference, prompt, each).token_ids


@pytest.mark.parametrize("exits", [("full",) * 4, (2, "full", 1, "full")], ids=["full", "mixed"])
def test_passes_begin_ahead_beside_prompts_and_at_several_exits(llama_on_device, exits):
    """Requests that wait are let in as well; only what a policy decides is waited for."""
    model, reference = llama_on_device.model, llama_on_device.reference
    prompts = [list(range(1, 20)), [4, 5], list(range(7, 40)), list(range(3, 14))]
    options = [
        {"max_new_tokens": 9 + 3 * at, "exit": exit, "ignore_eos": True, "temperature": 0.7 * at}
        for at, exit in enumerate(exits)
    ]
    with WatchedEngine(model, max_sequences=3, prefill_tokens=4) as engine:
        with engine._admission.changed:
            running = [
                engine.submit(prompt, **each) for prompt, each in zip(prompts, options, strict=True)
            ]
        results = [each.result(TIMEOUT) for each in running]
        assert engine.ahead == engine.stats().passes - 1
    assert engine.unseen > 25
    for prompt, each, result in zip(prompts, options, results, strict=True):
        assert result.token_ids == alone(reference, prompt, each).token_ids


def test_the_token_after_the_end_is_not_kept_for_others(llama_on_device):
    """A request ends on a token that nobody foresaw; what it left serves one that goes on."""
    model, reference = llama_on_device.model, llama_on_device.reference
    prompt = list(range(1, 21))
    plain = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.0}
    free = alone(reference, prompt, plain).token_ids
    stop = next(token for at, token in enumerate(free) if at > 4 and token not in free[:at])
    with WatchedEngine(model, max_sequences=2) as engine:
        first = engine.submit(prompt, stop_token_ids=[stop], **plain).result(TIMEOUT)
        assert first.finish_reason == "stop_token"
        assert engine.stats().pass_tokens == len(prompt) + len(first.token_ids)  # one was dropped
        longer = [*prompt, *first.token_ids, 7, 8]
        second = engine.submit(longer, **plain).result(TIMEOUT)
        assert second.usage.cached_tokens == len(prompt) + len(first.token_ids) - 1
    assert second.token_ids == alone(reference, longer, plain).token_ids


def test_a_copied_prefix_brings_what_stopped_at_an_exit(llama_on_device):
    model, reference = llama_on_device.model, llama_on_device.reference
    prefix = list(range(1, 31))
    with WatchedEngine(model, max_sequences=2) as engine:
        first = engine.submit([*prefix, 5], exit=1, max_new_tokens=30, ignore_eos=True)
        next(iter(first))
        second = engine.submit([*prefix, 6], exit=3, max_new_tokens=4).result(TIMEOUT)
        assert second.usage.cached_tokens == 30
    expected = alone(reference, [*prefix, 6], {"exit": 3, "max_new_tokens": 4})
    assert second.token_ids == expected.token_ids


def test_samplings_are_asked_of_the_device(llama_on_device, monkeypatch):
    """No logits come to the host but those of the one request whose penalties need them."""
    model, reference = llama_on_device.model, llama_on_device.reference
    engines, rows = model.engines, []
    logits = engines.logits
    monkeypatch.setattr(
        engines, "logits", lambda hidden, depth: rows.append(len(hidden)) or logits(hidden, depth)
    )
    ways = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.7, "exit": 2},
        {"exit": 2},
    ]
    for more in ([], [{"repetition_penalty": 1.3, "temperature": 0.7}]):
        options = [{"max_new_tokens": 14, "ignore_eos": True, **way} for way in [*ways, *more]]
        with WatchedEngine(model, max_sequences=6) as engine:
            running = [
                engine.submit([at + 1, 2], GenerationOptions(**each))
                for at, each in enumerate(options)
            ]
            results = [each.result(TIMEOUT) for each in running]
        assert rows == [1] * 14 * len(more)
        for at, (each, result) in enumerate(zip(options, results, strict=True)):
            assert result.token_ids == alone(reference, [at + 1, 2], each).token_ids


def test_more_requests_than_an_answer_has_rows(llama_on_device):
    model, reference = llama_on_device.model, llama_on_device.reference
    options = [
        {"max_new_tokens": 5 + at % 4, "ignore_eos": True, "temperature": 0.5 * (at % 2)}
        for at in range(35)
    ]
    with WatchedEngine(model, max_sequences=35) as engine:
        running = [engine.submit([at + 1], **each) for at, each in enumerate(options)]
        results = [each.result(TIMEOUT) for each in running]
    for at, (each, result) in enumerate(zip(options, results, strict=True)):
        assert result.token_ids == alone(reference, [at + 1], each).token_ids


def test_a_launch_that_fails(llama_on_device, monkeypatch):
    """The requests are told, and what comes after them runs on an empty cache."""
    model, reference = llama_on_device.model, llama_on_device.reference
    plain = {"max_new_tokens": 12, "ignore_eos": True}
    expected = alone(reference, [1, 2], plain).token_ids
    launch, driver = llama_on_device.driver.cuGraphLaunch, llama_on_device.driver
    with WatchedEngine(model, max_sequences=2) as engine:
        assert engine.submit([1, 2], **plain).result(TIMEOUT).token_ids == expected

        def fail(*arguments):
            monkeypatch.setattr(driver, "cuGraphLaunch", launch)
            raise OSError("no device")

        monkeypatch.setattr(driver, "cuGraphLaunch", fail)
        running = [engine.submit([first], **plain) for first in (1, 2)]
        for each in running:
            with pytest.raises(BackendError, match="no device"):
                each.result(TIMEOUT)
        again = [engine.submit([1, 2], **plain) for _ in range(2)]
        assert [each.result(TIMEOUT).token_ids for each in again] == [expected, expected]


@pytest.mark.parametrize(
    ("sampled", "exits"), [(False, []), (True, []), (False, [2])], ids=["greedy", "sampled", "exit"]
)
def test_nothing_is_recorded_after_warming_up(llama_on_device, rng, monkeypatch, sampled, exits):
    """Whatever requests come together, with any temperatures and none."""
    model, reference = llama_on_device.model, llama_on_device.reference
    device = model.engines.device
    captured = []

    def capture(work):
        captured.append(work)
        return type(device).capture(device, work)

    monkeypatch.setattr(device, "capture", capture)
    with WatchedEngine(model, max_sequences=3, prefix_cache=False) as engine:
        engine.warm_up(sampled=sampled, exits=exits)
        before, slots = len(captured), engine.max_sequences
        assert before > 2 * slots
        asked = [
            (
                rng.integers(3, model.spec.vocab_size, int(rng.integers(1, 30))).tolist(),
                {"max_new_tokens": int(rng.integers(1, 12)), "ignore_eos": True, "seed": at}
                | ({"temperature": 0.4 * (at % 4), "top_k": 5 + at} if sampled and at % 4 else {})
                | ({"exit": exits[0]} if exits and at % 2 else {}),
            )
            for at in range(30)
        ]
        engine.on_pass = lambda _: time.sleep(0.002 * (rng.random() < 0.2))
        running = []
        for prompt, options in asked:
            running.append(engine.submit(prompt, **options))
            time.sleep(0.004 * rng.random())
        results = [each.result(TIMEOUT) for each in running]
    assert len(captured) == before
    for (prompt, options), result in zip(asked[:8], results[:8], strict=True):
        assert result.token_ids == alone(reference, prompt, options).token_ids


def test_text_is_made_while_the_device_has_something_to_do(llama_on_device, monkeypatch):
    """Beside prompts too, where the next pass depends on the tokens before."""
    model, in_flight = llama_on_device.model, []

    class Counting(WatchedEngine):
        launched = handed_out = 0

        def _begin(self):
            slots = super()._begin()
            real = self._launcher.launch

            def counted(*given):
                result = real(*given)
                self.launched += len(result)
                return result

            monkeypatch.setattr(self._launcher, "launch", counted)
            return slots

        def _hand_out(self, launched):
            super()._hand_out(launched)
            self.handed_out += 1

        def _tell(self):
            in_flight.extend([self.launched > self.handed_out] * len(self._untold))
            super()._tell()

    with Counting(model, max_sequences=3, prefill_tokens=4) as engine:
        with engine._admission.changed:
            running = [
                engine.submit([1, 2, 3] * each, max_new_tokens=12, ignore_eos=True)
                for each in (1, 4, 8)
            ]
        results = [each.result(TIMEOUT) for each in running]
    assert [len(each.token_ids) for each in results] == [12, 12, 12]
    assert len(in_flight) == 36
    assert in_flight.count(False) <= 3  # when nothing is left to run


def test_a_request_that_has_ended_is_told_where_the_next_pass_fails(llama_on_device):
    model, driver = llama_on_device.model, llama_on_device.driver
    with WatchedEngine(model, max_sequences=2, prefill_tokens=4) as engine:

        def fail_after_the_first_has_ended():
            if any(each.over for each in engine._untold):
                driver.failing = "CUDA_ERROR_LAUNCH_FAILED"

        hand_out = engine._hand_out

        def failing(launched):
            hand_out(launched)
            fail_after_the_first_has_ended()

        engine._hand_out = failing
        with engine._admission.changed:
            short = engine.submit([1, 2, 3], max_new_tokens=1)
            long = engine.submit([4, 5, 6] * 9, max_new_tokens=8)
        assert len(short.result(TIMEOUT).token_ids) == 1
        with pytest.raises(BackendError, match="every running request failed"):
            long.result(TIMEOUT)


def test_a_closed_engine_is_not_warmed_up(llama_on_device):
    engine = WatchedEngine(llama_on_device.model)
    engine.close()
    with pytest.raises(OjfaError, match="closed"):
        engine.warm_up()
