"""Generating with a bundle: what comes, in which order, and why it ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ojfa_export
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.errors import UsageError
from ojfa_export.runtime.generation import Settings, collect, generate_tokens
from ojfa_export.runtime.model import Model

PROMPTS = ["def parse(self, argument):\n", "x", "import argparse as _argparse\nfor"]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return ojfa_export.load(tiny_bundle)


def generate(model: Model, prompts: list[list[int]], **changes):
    """Token ids in, so that end-of-text tokens can be chosen."""
    chosen = {
        "exit": "full",
        "max_new_tokens": 8,
        "sampling": Sampling(),
        "stop": (),
        "eos_token_ids": (),
        **changes,
    }
    session = model.session(len(prompts))
    return collect(
        prompts, generate_tokens(session, prompts, model.tokenizer, Settings(**chosen))
    ).prompts


def greedy(model: Model, prompt: list[int], count: int, exit="full") -> list[int]:
    """Each token by a session of its own, which runs everything at once."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.session().advance(ids, exit)[0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("exit", ["full", 1, 3, 4])
def test_greedy_tokens(model, exit):
    result = model.generate(PROMPTS[0], exit=exit, max_new_tokens=6)
    [completion] = result.prompts
    assert completion.prompt_token_ids == model.tokenizer.encode(PROMPTS[0]).ids
    expected = greedy(model, completion.prompt_token_ids, 6, exit)
    assert completion.token_ids == expected[: len(completion.token_ids)]
    assert completion.exit_blocks == [4 if exit == "full" else exit] * len(completion.token_ids)
    assert result.tokens_per_second > 0
    assert result.time_to_first_token_ms > 0


def test_max_new_tokens(model):
    [completion] = generate(model, [[5, 6, 7]], max_new_tokens=1)
    assert len(completion.token_ids) == 1
    assert completion.finish_reason == "max_new_tokens"


def test_end_of_text(model):
    prompt = [5, 6, 7]
    tokens = greedy(model, prompt, 8)
    end = next(token for token in tokens if token not in tokens[: tokens.index(token)])
    [completion] = generate(model, [prompt], eos_token_ids=(319, end))
    count = tokens.index(end) + 1
    assert completion.token_ids == tokens[:count]
    assert completion.finish_reason == "end_of_text"
    assert completion.text == model.tokenizer.decode(tokens[: count - 1])


def test_the_bundles_own_end_of_text_ends(model):
    [end] = model.spec.eos_token_ids
    for seed in range(200):
        [completion] = model.generate("x", temperature=5.0, seed=seed, max_new_tokens=60).prompts
        if completion.finish_reason == "end_of_text":
            break
    assert completion.token_ids.index(end) == len(completion.token_ids) - 1
    assert "<|endoftext|>" not in completion.text


def test_stop_string(model):
    [whole] = model.generate(PROMPTS[0], max_new_tokens=30, temperature=1.0, seed=2).prompts
    stop = whole.text[5:8]
    [completion] = model.generate(
        PROMPTS[0], max_new_tokens=30, temperature=1.0, seed=2, stop=[stop, "not in the text"]
    ).prompts
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.finish_reason == "stop_string"
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert stop in model.tokenizer.decode(completion.token_ids)
    assert stop not in model.tokenizer.decode(completion.token_ids[:-1])
    same = model.generate(PROMPTS[0], max_new_tokens=30, temperature=1.0, seed=2, stop=stop)
    assert same.prompts == [completion]


def test_stop_string_that_is_a_special_token(model):
    """Text leaves them out, and generation ends at them all the same."""
    forced = {"logit_bias": {0: 1e4}, "ignore_eos": True, "stop": "<|endoftext|>"}
    [completion] = model.generate(PROMPTS[0], max_new_tokens=9, **forced).prompts
    assert (completion.finish_reason, completion.token_ids) == ("stop_string", [0])
    assert completion.text == ""
    [token] = model.stream(PROMPTS[0], max_new_tokens=9, **forced)
    assert token.finish_reason == "stop_string"


def test_text_held_for_a_stop_string_comes_at_the_end(model):
    [whole] = model.generate(PROMPTS[0], max_new_tokens=10, temperature=1.0, seed=2).prompts
    [held] = model.generate(
        PROMPTS[0], max_new_tokens=10, temperature=1.0, seed=2, stop=whole.text + "and more"
    ).prompts
    assert held == whole


def test_cache_full(model):
    length = model.manifest.cache.max_length
    prompt = [7] * (length - 3)
    [completion] = generate(model, [prompt], max_new_tokens=100)
    # The last token needs no row: nothing follows it.
    assert completion.token_ids == greedy(model, prompt, 4)
    assert completion.finish_reason == "cache_full"


def test_a_prompt_that_fills_the_cache(model):
    [completion] = generate(model, [[7] * model.manifest.cache.max_length])
    assert len(completion.token_ids) == 1
    assert completion.finish_reason == "cache_full"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_prompts(model, temperature):
    """The first row's random numbers are those of a lone prompt; the others have their own."""
    chosen = {"max_new_tokens": 12, "temperature": temperature, "seed": 4}
    batch = model.generate(PROMPTS, **chosen).prompts
    for row, prompt in enumerate(PROMPTS if temperature == 0 else PROMPTS[:1]):
        assert batch[row] == model.generate(prompt, **chosen).prompts[0]


def test_rows_keep_their_tokens_whatever_their_neighbours(model):
    sampling = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    first = model.generate([PROMPTS[1], PROMPTS[0]], **sampling).prompts[1]
    second = model.generate([PROMPTS[2], PROMPTS[0], "y"], **sampling).prompts[1]
    assert first == second


def test_the_seed_decides(model):
    def text(seed: int) -> str:
        return model.generate("x", temperature=1.0, seed=seed, max_new_tokens=20).prompts[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) == 5


def test_top_k_1_is_greedy(model):
    sampled = model.generate(PROMPTS, temperature=2.0, top_k=1, max_new_tokens=5).prompts
    assert sampled == model.generate(PROMPTS, max_new_tokens=5).prompts


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(
        st.lists(st.integers(1, 250), min_size=1, max_size=30), min_size=1, max_size=4
    ),
    eos=st.sets(st.integers(0, 319), max_size=40),
    count=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_tokens_come_step_by_step(model, prompts, eos, count, seed):
    chosen = Settings(2, count, Sampling(3.0, seed=seed), ("e", "=="), tuple(eos))
    session = model.session(len(prompts))
    tokens = list(generate_tokens(session, prompts, model.tokenizer, chosen))
    running = list(range(len(prompts)))
    position = 0
    while position < len(tokens):
        step = tokens[position : position + len(running)]
        assert [token.row for token in step] == running
        running = [token.row for token in step if token.finish_reason is None]
        position += len(step)
    assert not running
    for row, completion in enumerate(collect(prompts, iter(tokens)).prompts):
        ids, reason = completion.token_ids, completion.finish_reason
        assert completion.exit_blocks == [2] * len(ids)
        assert not eos & set(ids[:-1])
        assert (ids[-1] in eos) == (reason == "end_of_text")
        assert len(ids) <= count
        assert len(prompts[row]) + len(ids) <= session.max_length + 1
        if reason == "max_new_tokens":
            assert len(ids) == count
        if reason == "cache_full":
            assert len(prompts[row]) + len(ids) == session.max_length + 1
        # Only text that was held back may turn out to hold a stop string at the very end.
        assert "e" not in completion.text
        assert "==" not in completion.text


def test_stream_is_generate(model):
    chosen = {"max_new_tokens": 20, "temperature": 1.0, "seed": 9, "exit": 2, "stop": "\n"}
    expected = model.generate(PROMPTS, **chosen).prompts
    encoded = [model.encode(prompt) for prompt in PROMPTS]
    assert collect(encoded, model.stream(PROMPTS, **chosen)).prompts == expected


def test_a_stream_can_be_left(model):
    stream = model.stream(PROMPTS, max_new_tokens=20)
    first = next(stream)
    stream.close()
    assert first == next(model.stream(PROMPTS, max_new_tokens=20))


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("", {}, "the prompt is empty"),
        (["x", ""], {}, "the prompt is empty"),
        ([], {}, "no prompt was given"),
        ("é" * 40, {}, "the prompt has 80 tokens, the cache holds 64"),
        (["x"] * 17, {}, "batch size 17 is outside this bundle's 1..16"),
        ("x", {"max_new_tokens": 0}, "max-new-tokens must be 1 or more, not 0"),
        ("x", {"exit": 5}, "exit 5 is outside this model's 1..4"),
        ("x", {"exit": 0}, "exit 0"),
        ("x", {"stop": ["a", ""]}, "a stop string is empty"),
        ("x", {"temperature": -1}, "temperature"),
        ("x", {"top_p": 2}, "top-p"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_arguments_out_of_range(model, method, prompts, arguments, message):
    """Refused at the call, before the first token is asked for."""
    with pytest.raises(UsageError, match=message):
        getattr(model, method)(prompts, **arguments)


@pytest.mark.parametrize(
    ("batch_size", "max_length", "message"),
    [(0, None, "batch size 0"), (17, None, "1..16"), (1, 0, "cache length 0"), (1, 65, "1..64")],
)
def test_sessions_out_of_range(model, batch_size, max_length, message):
    with pytest.raises(UsageError, match=message) as error:
        model.session(batch_size, max_length)
    assert "--max-" in error.value.hint


def test_a_models_sessions(model):
    session = model.session(2, 10)
    assert (session.batch_size, session.max_length) == (2, 10)
    assert model.session().max_length == model.manifest.cache.max_length
    logits = session.advance([[1, 2], [3]], 2)
    assert logits.shape == (2, model.spec.vocab_size)
    assert logits.dtype == np.float32


def test_blocks_past_the_exit_are_not_opened(tiny_bundle):
    model = ojfa_export.load(tiny_bundle)
    list(model.stream("def", exit=2, max_new_tokens=5))
    assert model.engines._sessions.keys() == {"embed", "block_00", "block_01", "exit_head"}
    assert model.blocks == 4
