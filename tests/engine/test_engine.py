"""Requests that run together against each alone, and what the engine does with them."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
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

import ojfa_export
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.engine.budget import page_bytes
from ojfa_export.errors import BackendError, OjfaError, OverloadedError, UsageError

examples = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@examples
@given(requests=requests, slots=st.integers(1, 4), pages=st.sampled_from([3, 100]))
def test_requests_give_the_tokens_of_each_alone(model, requests, slots, pages):
    """Whatever joins, leaves, is cancelled, shares a prefix or is sent back for want of pages."""
    engine = check_each_gives_what_it_gives_alone(model, model, requests, slots, pages)
    assert not engine.ahead


def test_pages_that_run_out_send_the_youngest_back(llama):
    prompts = [list(range(first, first + 20)) for first in (1, 30, 60)]
    budget = 4 * page_bytes(llama.spec)
    with WatchedEngine(llama, max_sequences=3, kv_cache_bytes=budget) as engine:
        options = GenerationOptions(max_new_tokens=30, ignore_eos=True)
        running = [engine.submit(prompt, options) for prompt in prompts]
        results = [each.result(TIMEOUT) for each in running]
        assert engine.stats().preemptions > 0
    for prompt, result in zip(prompts, results, strict=True):
        expected = alone(llama, prompt, {"max_new_tokens": 30, "ignore_eos": True})
        assert result.token_ids == expected.token_ids


def test_what_comes_while_an_idle_engine_is_held_begins_in_one_pass(llama):
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    with WatchedEngine(llama, max_sequences=4) as engine:
        assert engine.hold()
        held = [engine.submit([first, 2, 3], options) for first in (4, 5, 6)]
        assert engine.stats().running == 0
        engine.release()
        results = [each.result(TIMEOUT) for each in held]
        assert engine.stats().passes == 8
    for each, result in zip(held, results, strict=True):
        expected = alone(llama, each.prompt_token_ids, {"max_new_tokens": 8, "ignore_eos": True})
        assert result.token_ids == expected.token_ids


def test_an_engine_that_runs_is_not_held(llama, monkeypatch):
    goes_on = threading.Event()
    with WatchedEngine(llama, max_sequences=2) as engine:
        launch = engine._launcher.launch
        monkeypatch.setattr(
            engine._launcher, "launch", lambda work: goes_on.wait(TIMEOUT) and launch(work)
        )
        first = engine.submit([4, 2, 3], max_new_tokens=4, ignore_eos=True)
        while not engine.stats().running:
            time.sleep(0.001)
        assert not engine.hold()
        second = engine.submit([5, 2, 3], max_new_tokens=2, ignore_eos=True)
        goes_on.set()
        assert [len(each.result(TIMEOUT).token_ids) for each in (first, second)] == [4, 2]


def test_closing_waits_for_no_release(llama):
    with WatchedEngine(llama, max_sequences=2) as engine:
        assert engine.hold()
        waiting = engine.submit([6, 2, 3], max_new_tokens=2)
        assert not waiting.done
    assert waiting.result(TIMEOUT).finish_reason == "cancelled"


def test_whoever_finds_no_pages_is_not_looked_at_in_every_pass(llama, monkeypatch):
    with WatchedEngine(llama, max_sequences=3, kv_cache_bytes=2 * page_bytes(llama.spec)) as engine:
        asked, take = [], engine._admission.slots.take
        monkeypatch.setattr(
            engine._admission.slots,
            "take",
            lambda sequence, _: asked.append(sequence) or take(sequence, _),
        )
        options = GenerationOptions(max_new_tokens=25, ignore_eos=True)
        with engine._admission.changed:
            running = [engine.submit(prompt, options) for prompt in ([1], [2] * 40, [3])]
        results = [each.result(TIMEOUT) for each in running]
        assert len(asked) < 10 < engine.passes
    for each, result in zip(running, results, strict=True):
        expected = alone(llama, each.prompt_token_ids, {"max_new_tokens": 25, "ignore_eos": True})
        assert result.token_ids == expected.token_ids


def test_a_copied_prefix_brings_what_stopped_at_an_exit(llama):
    """The first one still runs, and its tokens have not been deeper than its exit."""
    prefix = np.random.default_rng(1).integers(llama.spec.vocab_size, size=30).tolist()
    with WatchedEngine(llama, max_sequences=2) as engine:
        first = engine.submit([*prefix, 5], exit=1, max_new_tokens=30, ignore_eos=True)
        next(iter(first))
        second = engine.submit([*prefix, 6], exit=3, max_new_tokens=4).result(TIMEOUT)
        assert second.usage.cached_tokens == 30
    expected = alone(llama, [*prefix, 6], {"exit": 3, "max_new_tokens": 4})
    assert second.token_ids == expected.token_ids


def test_a_request_that_outgrows_all_pages_fails_alone(llama):
    with WatchedEngine(llama, kv_cache_bytes=page_bytes(llama.spec)) as engine:
        request = engine.submit([1] * 20, GenerationOptions(max_new_tokens=40, ignore_eos=True))
        with pytest.raises(OjfaError, match="more than the 32 tokens of the KV cache"):
            request.result(TIMEOUT)
        with pytest.raises(UsageError, match="the KV cache holds 32"):
            engine.submit([1] * 40)
        assert engine.submit([1], GenerationOptions(max_new_tokens=3)).result(TIMEOUT).token_ids


def test_a_common_prefix_is_computed_once(llama):
    prefix = np.random.default_rng(0).integers(llama.spec.vocab_size, size=30).tolist()
    with WatchedEngine(llama, max_sequences=2) as engine:
        options = GenerationOptions(max_new_tokens=4)
        first = engine.submit([*prefix, 5], options).result(TIMEOUT)
        second = engine.submit([*prefix, 6, 7], options).result(TIMEOUT)
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == 30
        assert engine.stats().pass_tokens < 2 * 40
    assert second.token_ids == alone(llama, [*prefix, 6, 7], {"max_new_tokens": 4}).token_ids


def test_cancelling_a_prompt_that_is_being_read(llama):
    with WatchedEngine(llama, prefill_tokens=1) as engine:
        running = engine.submit([3], GenerationOptions(max_new_tokens=50, ignore_eos=True))
        next(iter(running))
        request = engine.submit([1] * 50, GenerationOptions(max_new_tokens=9))
        request.cancel()
        result = request.result(TIMEOUT)
        assert (result.finish_reason, result.token_ids) == ("cancelled", [])
        assert running.result(TIMEOUT).finish_reason == "max_new_tokens"


def test_time_that_is_up(llama):
    with WatchedEngine(llama) as engine:
        assert engine.submit([1, 2], timeout=0.0).result(TIMEOUT).finish_reason == "timeout"


def test_a_full_queue_says_so(llama):
    with WatchedEngine(llama, max_sequences=1, max_queue=1) as engine:
        options = GenerationOptions(max_new_tokens=60, ignore_eos=True)

        def submit_many() -> None:
            for _ in range(50):
                engine.submit([1], options)

        with pytest.raises(OverloadedError, match="waiting already"):
            submit_many()


def test_a_closed_engine(llama):
    engine = WatchedEngine(llama)
    request = engine.submit([1], GenerationOptions(max_new_tokens=60, ignore_eos=True))
    engine.close()
    engine.close()
    assert request.result(TIMEOUT).finish_reason in ("cancelled", "max_new_tokens")
    with pytest.raises(OjfaError, match="closed"):
        engine.submit([1])


def test_closing_gives_the_cache_back(llama):
    with WatchedEngine(llama) as engine:
        engine.submit(list(range(30)), max_new_tokens=2).result(TIMEOUT)
        assert engine.stats().pages_used
    assert not engine.stats().pages_used


def test_an_error_of_the_device_fails_what_runs_and_the_engine_goes_on(llama, monkeypatch):
    with WatchedEngine(llama, prefix_cache=False) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner.executor, "run", None)
            request = engine.submit([1, 2])
            with pytest.raises(BackendError, match="every running request failed"):
                request.result(TIMEOUT)
        expected = alone(llama, [1, 2], {"max_new_tokens": 5}).token_ids
        again = engine.submit([1, 2], GenerationOptions(max_new_tokens=5))
        assert again.result(TIMEOUT).token_ids == expected
        assert engine.stats().finished["error"] == 1


def test_tokens_come_as_they_are_made(llama):
    with WatchedEngine(llama) as engine:
        request = engine.submit([1, 2, 3], GenerationOptions(max_new_tokens=6, ignore_eos=True))
        streamed = list(request)
        result = request.result(TIMEOUT)
    assert [token.id for token in streamed] == result.token_ids
    assert "".join(token.text for token in streamed) == result.text
    assert [token.finish_reason for token in streamed] == [None] * 5 + ["max_new_tokens"]
    assert 0 < result.time_to_first_token <= result.seconds
    assert result.usage.new_tokens == 6


def test_from_asyncio_with_another_thread_beside_it(llama):
    async def read(engine, prompt):
        request = engine.submit(prompt, GenerationOptions(max_new_tokens=8, ignore_eos=True))
        return [token.id async for token in request]

    async def read_all(engine):
        return await asyncio.gather(*(read(engine, [first, 2]) for first in range(1, 9)))

    with WatchedEngine(llama, max_sequences=4) as engine:
        beside: list[list[int]] = []
        options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
        thread = threading.Thread(
            target=lambda: beside.append(engine.submit([9, 9], options).result(TIMEOUT).token_ids)
        )
        thread.start()
        results = asyncio.run(read_all(engine))
        thread.join()
    plain = {"max_new_tokens": 8, "ignore_eos": True}
    assert results == [alone(llama, [first, 2], plain).token_ids for first in range(1, 9)]
    assert beside == [alone(llama, [9, 9], plain).token_ids]


def test_a_request_is_awaited_and_cancelled_where_its_block_is_left(llama):
    options = GenerationOptions(max_new_tokens=50, ignore_eos=True)

    async def leave_early(engine):
        with engine.submit([1, 2], options) as request:
            async for _ in request:
                break
        return await request

    async def wait(engine):
        with engine.submit([3], max_new_tokens=4) as request:
            return await request

    async def both(engine):
        return await asyncio.gather(leave_early(engine), wait(engine))

    with WatchedEngine(llama, max_sequences=2) as engine:
        left, whole = asyncio.run(both(engine))
        with engine.submit([4], options) as request:
            next(iter(request))
        assert request.result(TIMEOUT).finish_reason in ("cancelled", "max_new_tokens")
    assert left.finish_reason in ("cancelled", "max_new_tokens")
    assert left.token_ids == alone(llama, [1, 2], {"max_new_tokens": 50, "ignore_eos": True}
                                   ).token_ids[: len(left.token_ids)]  # fmt: skip
    assert whole.token_ids == alone(llama, [3], {"max_new_tokens": 4}).token_ids


def test_a_loop_that_was_closed_harms_nobody(llama):
    """A task may be gone, with its loop, before the next token comes."""

    async def ask(request):
        await asyncio.wait_for(anext(aiter(request)), 0.01)

    with WatchedEngine(llama, prefix_cache=False) as engine:
        go_on = threading.Event()
        run = engine._runner.executor.run

        def slow(*args, **kwargs):
            assert go_on.wait(TIMEOUT)
            return run(*args, **kwargs)

        engine._runner.executor.run = slow
        request = engine.submit([1, 2], max_new_tokens=5)
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(ask(request))
        go_on.set()
        expected = alone(llama, [1, 2], {"max_new_tokens": 5}).token_ids
        assert request.result(TIMEOUT).token_ids == expected


def test_stop_string_that_is_a_special_token(llama):
    forced = {"logit_bias": {0: 1e4}, "ignore_eos": True, "stop": "<|endoftext|>"}
    with WatchedEngine(llama) as engine:
        result = engine.submit("def main(", **forced, max_new_tokens=9).result(TIMEOUT)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [0], "stop_string")


def test_text_prompts_and_stop_strings(llama):
    options = {"max_new_tokens": 20, "ignore_eos": True}
    text = llama.generate("def main(", **options).prompts[0].text
    stop = text[len(text) // 2 :][:2]
    expected = llama.generate("def main(", **options, stop=stop).prompts[0]
    with WatchedEngine(llama) as engine:
        result = engine.submit("def main(", GenerationOptions(**options, stop=stop)).result(TIMEOUT)
    assert (result.text, result.finish_reason) == (expected.text, "stop_string")


def test_the_public_name():
    assert ojfa_export.Engine.__name__ == "Engine"
    assert ojfa_export.GenerationOptions().max_new_tokens == 64


def test_warming_up_is_not_counted(llama):
    with WatchedEngine(llama, max_sequences=3) as engine:
        engine.warm_up()
        assert engine.passes > 20
        assert engine.stats().new_tokens == engine.stats().passes == 0
        result = engine.submit([1, 2, 3], GenerationOptions(max_new_tokens=4)).result(TIMEOUT)
    assert result.token_ids == alone(llama, [1, 2, 3], {"max_new_tokens": 4}).token_ids


def test_text_that_cannot_be_made_fails_its_request_alone(llama, monkeypatch):
    from ojfa_export.runtime.text import TextStream

    push = TextStream.push

    def failing(self, token):
        if self is broken[0]:
            raise ValueError("no such token")
        return push(self, token)

    broken = [None]
    monkeypatch.setattr(TextStream, "push", failing)
    with WatchedEngine(llama, max_sequences=2) as engine:
        with engine._admission.changed:
            bad, good = (
                engine.submit([1 + at, 2, 3], max_new_tokens=6, ignore_eos=True) for at in (0, 1)
            )
            broken[0] = engine._admission.waiting[0]._text
        with pytest.raises(OjfaError, match="no text could be made"):
            bad.result(TIMEOUT)
        assert len(good.result(TIMEOUT).token_ids) == 6
