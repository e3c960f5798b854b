"""Every wrong argument of the Python interface is one of our errors; what is right is taken."""

from __future__ import annotations

import decimal
import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vectors.cases import open_bundle

import ojfa_export
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import OjfaError, UsageError
from ojfa_export.runtime.disagreement import DisagreementMonitor
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.monitor import Monitor

OPTIONS = tuple(GenerationOptions.__dataclass_fields__)


class Hostile:
    """Can't even be printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise ValueError("no")

    def __float__(self) -> float:
        raise ValueError("no")


WRONG_NUMBERS = [
    True, False, "5", "1", "", None, b"5", bytearray(b"5"), object(), Hostile(), [], [5], {}, set(),
    1j, math.nan, math.inf, -math.inf, -1, -0.5, np.True_, np.array([5]), np.array([1.0]),
    np.array("5"), np.float32("nan"), np.complex64(1), np.datetime64(5, "s"), torch.tensor([1, 2]),
    range(3), int, lambda: 5, decimal.Decimal("nan"), 10**5000, -(10**5000), 1e300, 2**63, 2**64,
]  # fmt: skip
numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.complex_numbers())
scalars = st.one_of(
    st.none(), numbers, st.text(max_size=4), st.binary(max_size=4), st.sampled_from(WRONG_NUMBERS)
)
junk = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.tuples(scalars, scalars),
    st.dictionaries(st.one_of(st.integers(-2, 5), st.text(max_size=2)), scalars, max_size=3),
    st.lists(st.lists(scalars, max_size=3), max_size=3),
    st.lists(numbers, max_size=4).map(lambda each: np.array(each, object)),
    st.lists(st.floats(width=32), max_size=4).map(np.array),
    st.just("auto"),
    st.builds(ExitPolicy, exits=st.just((1,)), measure=st.just("top"), thresholds=st.just((0.5,))),
    st.builds(Speculation),
    st.builds(Sampling),
    st.just(Model),
)
examples = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def model() -> Model:
    return open_bundle("llama")


def survives(call: Callable[[], Any]) -> None:
    """Nothing but success or an error that says something in one line."""
    try:
        call()
    except OjfaError as error:
        message, hint = error.message, error.hint or ""
    else:
        return
    assert message
    assert "\n" not in message + hint
    assert len(message) < 400


@pytest.mark.parametrize("name", [*OPTIONS, "nonsense"])
@examples
@given(value=junk)
def test_options_take_junk(name, value, model):
    def build() -> None:
        options = GenerationOptions.of(None, {name: value})
        options.check_fits(model.blocks, model.spec.vocab_size)

    survives(build)


@pytest.mark.parametrize("name", [*OPTIONS, "prompts", "monitor", "domain", "options"])
@examples
@given(value=junk)
def test_generate_and_stream_take_junk(name, value, model):
    arguments = {"prompts": [5, 6], "max_new_tokens": 2, name: value}
    survives(lambda: model.generate(**arguments))
    survives(lambda: next(model.stream(**arguments)))


@pytest.mark.parametrize("name", [*OPTIONS, "prompt", "timeout", "options"])
@examples
@given(value=junk)
def test_an_engine_takes_junk(name, value, model, junk_engine):
    def run() -> None:
        arguments = {"prompt": [5, 6], "max_new_tokens": 2, name: value}
        junk_engine.submit(**arguments).result(30.0)

    survives(run)


@pytest.fixture(scope="module")
def junk_engine(model):
    with ojfa_export.Engine(model, max_sequences=2) as engine:
        yield engine


@pytest.mark.parametrize(
    "name", ["model", "max_sequences", "kv_cache_bytes", "max_queue", "prefill_tokens",
             "prefix_cache"],
)  # fmt: skip
@examples
@given(value=junk)
def test_making_an_engine_of_junk(name, value, model):
    survives(lambda: ojfa_export.Engine(**{"model": model, name: value}).close())


SESSION_CALLS = {
    "session batch": lambda m, s, junk: m.session(junk),
    "session length": lambda m, s, junk: m.session(1, junk),
    "session monitor": lambda m, s, junk: m.session(monitor=junk),
    "advance tokens": lambda m, s, junk: s.advance(junk),
    "advance exit": lambda m, s, junk: s.advance([1], junk),
    "decide tokens": lambda m, s, junk: s.decide(junk, ExitPolicy(
        exits=(1,), measure="top", thresholds=(0.5,))),
    "decide policy": lambda m, s, junk: s.decide([1], junk),
    "choose tokens": lambda m, s, junk: s.choose(junk),
    "choose exit": lambda m, s, junk: s.choose([1], junk),
    "choose sampling": lambda m, s, junk: s.choose([1], "full", junk),
    "choose draws": lambda m, s, junk: s.choose([1], "full", Sampling(1.0), junk),
    "finish": lambda m, s, junk: s.finish(junk),
    "follow": lambda m, s, junk: s.follow(junk),
    "can follow": lambda m, s, junk: s.can_follow(junk),
    "complete tokens": lambda m, s, junk: s.complete(junk, [1]),
    "complete counts": lambda m, s, junk: s.complete([[1]], junk),
    "complete greedily": lambda m, s, junk: s.complete_greedily([[1]], junk),
    "deepen": lambda m, s, junk: s.deepen(junk),
    "rewind": lambda m, s, junk: s.rewind(junk),
    "rewind row": lambda m, s, junk: s.rewind(0, junk),
    "tokens": lambda m, s, junk: s.tokens(junk),
    "shadow checks": lambda m, s, junk: s.run_shadow_checks(junk),
    "encode": lambda m, s, junk: m.encode(junk),
    "resolve exit": lambda m, s, junk: m.resolve_exit(junk),
    "default prompts": lambda m, s, junk: m.default(junk),
    "default temperature": lambda m, s, junk: m.default(1, junk),
    "monitor share": lambda m, s, junk: Monitor(junk),
    "monitor seed": lambda m, s, junk: Monitor(0.5, seed=junk),
    "monitor disagreement": lambda m, s, junk: Monitor(0.5, junk),
    "monitor events": lambda m, s, junk: Monitor(0.5, on_event=junk),
    "monitor session": lambda m, s, junk: Monitor(0.5).finish(junk),
    "monitor watches": lambda m, s, junk: Monitor(0.5).watch(junk),
    "monitor domain": lambda m, s, junk: Monitor(0.5).check_domain(junk),
    "policy exits": lambda m, s, junk: ExitPolicy(exits=junk, measure="top", thresholds=(0.5,)),
    "policy measure": lambda m, s, junk: ExitPolicy(exits=(1,), measure=junk, thresholds=(0.5,)),
    "policy thresholds": lambda m, s, junk: ExitPolicy(exits=(1,), measure="top", thresholds=junk),
    "draft exit": lambda m, s, junk: Speculation(junk).resolve_exit(4),
    "draft length": lambda m, s, junk: Speculation(draft=junk),
    "draft cost": lambda m, s, junk: Speculation(draft_cost=junk),
    "check cost": lambda m, s, junk: Speculation(check_cost=junk),
    "round cost": lambda m, s, junk: Speculation(round_cost=junk),
    "acceptance": lambda m, s, junk: Speculation(acceptance=junk),
}  # fmt: skip


@pytest.mark.parametrize("call", list(SESSION_CALLS))
@examples
@given(value=junk)
def test_sessions_policies_and_monitors_take_junk(call, value, model):
    session = model.session(monitor=Monitor(0.5))
    survives(lambda: SESSION_CALLS[call](model, session, value))
    # Whatever was refused has left it usable.
    session.rewind(0)
    assert session.advance([1, 2]).shape == (1, model.spec.vocab_size)


@pytest.mark.parametrize("path", [5, None, True, b"x", [], "no/such/bundle"])
def test_a_bundle_that_is_none(path):
    with pytest.raises(OjfaError):
        ojfa_export.load(path)


@pytest.mark.parametrize("backend", [5, None, True, [], {}, "abacus"])
def test_a_backend_that_is_none(model, backend):
    with pytest.raises(UsageError, match="backend"):
        ojfa_export.load(model.bundle.directory, backend=backend)


def test_false_alarms():
    for alpha in WRONG_NUMBERS:
        with pytest.raises(UsageError, match="a false-alarm rate must be"):
            DisagreementMonitor(None, alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": "5"}, "max-new-tokens must be a whole number, not '5'"),
        ({"max_new_tokens": True}, "max-new-tokens must be a whole number, not True"),
        ({"max_new_tokens": 1.0}, "max-new-tokens must be a whole number, not 1.0"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"temperature": 1.0, "seed": None}, "seed must be a whole number, not None"),
        ({"stop": None}, "stop must be a string or a list of strings, not None"),
        ({"stop": ["a", 5]}, "a stop string must be a string, not 5"),
        ({"stop": ["\ud800"]}, "a stop string must be text in UTF-8"),
        ({"stop_token_ids": 5}, "stop-token-ids must be a list of token ids, not 5"),
        ({"stop_token_ids": [-1]}, "a token id of stop-token-ids must be 0 or more, not -1"),
        ({"stop_token_ids": [320]}, "stop_token_ids has token ids outside 0..319"),
        ({"logit_bias": [5]}, "logit-bias must be a mapping of token ids to numbers"),
        ({"logit_bias": {"5": 1}}, "a token id of logit-bias must be a whole number, not '5'"),
        ({"logit_bias": {5: math.inf}}, "a value of logit-bias must be between -10000 and 10000"),
        ({"min_p": 1.5}, "min-p must be between 0 and 1, not 1.5"),
        ({"repetition_penalty": 0}, "repetition-penalty must be between 1e-06 and 1e"),
        ({"ignore_eos": 1}, "ignore-eos must be True or False, not 1"),
        ({"speculate": 1}, "speculate must be True, False or a Speculation, not 1"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, not 21"),
        ({"logprobs": True}, "logprobs must be a whole number, not True"),
        ({"exit": "6"}, "exit must be a whole number, not '6'"),
        ({"exit": 99}, "exit 99 is outside this model's"),
        ({"max_tokens": 5}, "there is no option 'max_tokens'"),
        ({"monitor": 5}, "the monitor must be of type Monitor, not 5"),
        ({"domain": 5}, "domain 5 was named, and nothing is monitored"),
        (
            {"speculate": True, "min_p": 0.1, "temperature": 1.0},
            "can't be combined with speculation",
        ),
    ],
)
def test_what_is_said_of_wrong_options(model, arguments, message):
    for call in (model.generate, model.stream):
        with pytest.raises(UsageError) as error:
            call([1, 2], **arguments)
        assert message in error.value.message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a prompt must be text, token ids, or a list of these, not None"),
        (5, "a prompt must be text"),
        (b"abc", "a prompt must be text"),
        ([b"abc"], "a prompt must be text"),
        ({1: 2}, "a prompt must be text"),
        ([1.5], "a prompt must be text"),
        ([1, 1.5], "a token id of a prompt must be a whole number, not 1.5"),
        ([1, True], "a token id of a prompt must be a whole number, not True"),
        ([[1], [None]], "a token id of a prompt must be a whole number, not None"),
        ("\ud800", "a prompt is not text in UTF-8"),
        ([320], "the prompt has token ids outside 0..319"),
        ([-1], "the prompt has token ids outside 0..319"),
        ([[]], "the prompt is empty"),
    ],
)
def test_what_is_said_of_wrong_prompts(model, prompt, message):
    with pytest.raises(UsageError) as error:
        model.generate(prompt)
    assert message in error.value.message


def test_numbers_of_other_libraries_are_taken(model, rng):
    ids = rng.integers(model.spec.vocab_size, size=9)
    plain: dict[str, Any] = {
        "exit": 2, "max_new_tokens": 4, "temperature": 0.75, "top_k": 9, "top_p": 0.5, "seed": 3,
        "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "logit_bias": {3: 1.5}, "stop_token_ids": (7,), "logprobs": 2,
    }  # fmt: skip
    expected = model.generate(ids.tolist(), **plain).prompts
    for whole, real in ((np.int64, np.float32), (np.uint16, np.float64), (np.array, np.array),
                        (torch.tensor, torch.tensor), (int, fractions.Fraction)):  # fmt: skip
        given: dict[str, Any] = {
            name: real(value) if isinstance(value, float) else value
            for name, value in plain.items()
        }
        for name in ("exit", "max_new_tokens", "top_k", "seed", "logprobs"):
            given[name] = whole(given[name])
        given["logit_bias"] = {3: real(1.5)}
        given["stop_token_ids"] = [whole(7)]
        prompt = [whole(token) for token in ids.tolist()]
        assert model.generate(prompt, **given).prompts == expected
    options = GenerationOptions(**plain)
    assert model.generate(ids, options).prompts == expected
    assert model.generate([ids], options).prompts == expected
    assert model.generate(tuple(ids), options, max_new_tokens=4).prompts == expected


def test_several_prompts_as_arrays(model, rng):
    both = rng.integers(model.spec.vocab_size, size=(2, 1))
    expected = model.generate(both.tolist(), max_new_tokens=3).prompts
    assert [len(each.prompt_token_ids) for each in expected] == [1, 1]
    assert model.generate(both, max_new_tokens=3).prompts == expected
    assert model.generate(list(both), max_new_tokens=3).prompts == expected


def test_options_are_read_once_and_stay():
    options = GenerationOptions(
        stop="x", stop_token_ids=[1, np.int32(2)], logit_bias={np.int8(3): 1}
    )
    assert options.stop == ("x",)
    assert options.stop_token_ids == (1, 2)
    assert options.logit_bias == {3: 1.0}
    assert GenerationOptions.of(options, {}) == options
    changed = GenerationOptions.of(options, {"exit": np.int64(6)})
    assert (changed.exit, type(changed.exit), changed.stop) == (6, int, ("x",))
