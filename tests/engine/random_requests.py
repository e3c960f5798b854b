"""Random requests: what they ask, when they come and are cancelled, and what each gives alone."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

from engine.watched_engine import WatchedEngine
from hypothesis import strategies as st

from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.engine.budget import PAGE_TOKENS, page_bytes

TIMEOUT = 60.0
MIDDLING = ExitPolicy(exits=(1, 3), measure="top", thresholds=(0.03, 0.03))
RARELY = ExitPolicy(exits=(2,), measure="margin", thresholds=(0.9,))

tokens = st.integers(0, 95)
# Some begin alike, so that prefixes are shared.
beginnings = st.sampled_from([[], list(range(1, 31))])
exits = st.sampled_from(["full", "full", 1, 2, 3, MIDDLING, RARELY])
samplings = st.sampled_from(
    [
        {},
        {},
        {"temperature": 0.9},
        {"temperature": 0.9, "seed": 2},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "seed": 1},
    ]
)
endings = st.sampled_from(
    [
        {},
        {"ignore_eos": True},
        {"stop": ["e", "=="]},
        {"stop_token_ids": list(range(0, 320, 9)), "ignore_eos": True},
    ]
)
on_host = st.sampled_from(
    [
        {},
        {},
        {},
        {"repetition_penalty": 1.4},
        {"logprobs": 2},
        {"logit_bias": {9: 4.0}, "min_p": 0.02},
    ]
)
speculations = st.sampled_from([True, Speculation(2, 3)])
# Of a model with a draft layer.
layer_speculations = st.sampled_from([True, Speculation(0, 3), Speculation(0), Speculation(2, 3)])


@st.composite
def option_sets(draw: Any, speculations: Any = speculations, rarely: int = 5) -> dict[str, Any]:
    options = {"max_new_tokens": draw(st.integers(1, 24)), **draw(samplings), **draw(endings)}
    if draw(st.integers(0, rarely)) == 0:
        return {**options, "exit": "full", "speculate": draw(speculations)}
    return {**options, "exit": draw(exits), **draw(on_host)}


# Passes after which something happens.
moments = st.integers(0, 20)


def _requests(options: Any) -> Any:
    return st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.tuples(beginnings, st.lists(tokens, min_size=1, max_size=25)),
                "options": options,
                "comes": st.one_of(st.just(0), moments),
                "cancelled_after": st.one_of(st.none(), st.none(), st.none(), moments),
            }
        ),
        min_size=1,
        max_size=12,
    )


requests = _requests(option_sets())
layer_requests = _requests(option_sets(layer_speculations, 1))


class Agenda:
    """What happens after so many passes, in the engine's thread while passes are on their way.

    Args:
        engine: Which.
    """

    def __init__(self, engine: WatchedEngine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._due: list[tuple[int, Callable[[], None]]] = []
        engine.on_pass = self._after

    def add(self, passes: int, action: Callable[[], None]) -> None:
        with self._lock:
            self._due.append((passes, action))

    def do_next(self) -> bool:
        """Does what comes next, where no more passes come; whether there was something."""
        return self._do(min((passes for passes, _ in self._due), default=-1))

    def _after(self, passes: int) -> None:
        self._do(passes)

    def _do(self, passes: int) -> bool:
        with self._lock:
            now = [action for after, action in self._due if after <= passes]
            self._due = [(after, action) for after, action in self._due if after > passes]
        for action in now:
            action()
        return bool(now)


def alone(model: Any, prompt: list[int], options: dict[str, Any]) -> Any:
    """What a request gives alone, by a session."""
    return model.generate([prompt], **options).prompts[0]


def bytes_of(model: Any, slots: int, pages: int) -> int:
    """A budget of so many pages, and of what a draft layer keeps beside them."""
    page_tokens = getattr(model.engines, "page_tokens", PAGE_TOKENS)
    pages_take, drafts = pages * page_bytes(model.spec, page_tokens=page_tokens), model.drafts
    if drafts is None:
        return pages_take
    whole = slots * (model.manifest.cache.max_length + 1)
    tokens = whole if drafts.takes_whole else pages * page_tokens
    return int(pages_take + tokens * drafts.token_bytes)


def check_each_gives_what_it_gives_alone(
    model: Any, reference: Any, requests: list[dict[str, Any]], slots: int, pages: int
) -> WatchedEngine:
    """Runs requests together, and each by a session.

    Args:
        model: Runs them together.
        reference: Runs each alone.
        requests: As of `requests`.
        slots: Of the engine.
        pages: Of its cache.
    """
    gc.collect()  # the cache of an engine before this one, which shares the device's stream
    budget = bytes_of(model, slots, pages)
    with WatchedEngine(model, max_sequences=slots, kv_cache_bytes=budget) as engine:
        agenda, running = Agenda(engine), []

        def submit(request: dict[str, Any]) -> None:
            prompt = [token % model.spec.vocab_size for part in request["prompt"] for token in part]
            options = request["options"]
            if "speculate" in options and model is not reference:
                # Small differences of logits, which each backend has, decide on sampled drafts.
                options = {**options, "temperature": 0.0}
            each = engine.submit(prompt, GenerationOptions(**options))
            running.append((prompt, options, each))
            if request["cancelled_after"] is not None:
                agenda.add(engine.passes + request["cancelled_after"], each.cancel)

        for request in requests:
            agenda.add(request["comes"], lambda request=request: submit(request))
        while agenda.do_next() or len(running) < len(requests):
            for _, _, each in list(running):
                each.result(TIMEOUT)
        for prompt, options, each in running:
            result, expected = each.result(TIMEOUT), alone(reference, prompt, options)
            if result.finish_reason == "cancelled":
                assert result.token_ids == expected.token_ids[: len(result.token_ids)]
                continue
            assert result.token_ids == expected.token_ids, options
            assert result.exit_blocks == expected.exit_blocks
            assert result.text == expected.text
            assert result.finish_reason == expected.finish_reason
        assert sum(engine.stats().finished.values()) == len(requests)
        engine.assert_everything_was_given_back()
    return engine
