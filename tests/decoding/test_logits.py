"""Penalties, biases, min-p and log probabilities against transformers and float64."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import LOGPROB, PENALISED_LOGIT_RELATIVE, PROBABILITY_FP32
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)

import ojfa_export
from ojfa_export.decoding.logits import LogitsProcessor
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.errors import UsageError
from ojfa_export.runtime.model import Model

VOCABULARY = 200
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return ojfa_export.load(tiny_bundle)


@pytest.fixture
def texts(rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[int]]:
    """Logits, a prompt, and generated tokens of which some come several times."""
    logits = rng.normal(scale=5, size=VOCABULARY).astype(np.float32)
    prompt = rng.integers(VOCABULARY, size=20).tolist()
    generated = [*rng.integers(VOCABULARY, size=10).tolist(), *prompt[:3], 5, 5, 5]
    return logits, prompt, generated


def processor(prompt: list[int], generated: list[int], **options) -> LogitsProcessor:
    made = LogitsProcessor(GenerationOptions(**options), prompt)
    for token in generated:
        made.push(token)
    return made


def in_float64(
    logits: np.ndarray, prompt: list[int], generated: list[int], options: GenerationOptions
) -> np.ndarray:
    """Adjusted logits in vLLM's order, loop by loop, with min-p as -inf."""
    values = [float(value) for value in logits]
    for token, bias in options.logit_bias.items():
        values[token] += bias
    for token in {*prompt, *generated}:
        penalty = options.repetition_penalty or 1.0
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(generated):
        values[token] -= options.frequency_penalty * generated.count(token)
        values[token] -= options.presence_penalty
    if options.min_p and options.temperature:
        shares = [math.exp((value - max(values)) / options.temperature) for value in values]
        values = [
            value if share >= options.min_p else -math.inf
            for value, share in zip(values, shares, strict=True)
        ]
    return np.array(values)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_against_transformers(texts, penalty):
    logits, prompt, generated = texts
    before = logits.copy()
    adjusted = processor(prompt, generated, repetition_penalty=penalty).adjust(logits)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + generated]), torch.tensor(logits[None].copy())
    )[0].numpy()
    np.testing.assert_allclose(adjusted, expected, rtol=PENALISED_LOGIT_RELATIVE)
    assert np.array_equal(logits, before)  # they are the model's, and may be given to others
    assert not np.array_equal(adjusted, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_min_p_against_transformers(texts, temperature, rng):
    logits, prompt, _ = texts
    options = GenerationOptions(temperature=temperature, min_p=float(rng.uniform(0.001, 0.3)))
    adjusted = LogitsProcessor(options, prompt).adjust(logits)
    scaled = torch.tensor(logits[None].astype(np.float64) / temperature)
    warped = MinPLogitsWarper(options.min_p)(torch.tensor([prompt]), scaled)
    expected = torch.softmax(warped[0], -1).numpy()
    assert 1 <= np.count_nonzero(expected) < VOCABULARY
    found = options.sampling.probabilities(adjusted)
    assert np.array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=PROBABILITY_FP32)


def test_everything_together_in_the_order_of_servers(texts, rng):
    logits, prompt, generated = texts
    biased = rng.choice(VOCABULARY, size=8, replace=False).tolist()
    biased[:2] = [generated[0], prompt[0]]  # a bias comes before the penalties
    options = GenerationOptions(
        temperature=0.8,
        min_p=0.01,
        repetition_penalty=1.7,
        presence_penalty=0.6,
        frequency_penalty=0.9,
        logit_bias={token: float(rng.normal(scale=8)) for token in biased},
    )
    made = LogitsProcessor(options, prompt)
    for count in (0, 1, len(generated)):
        made = LogitsProcessor(options, prompt)
        for token in generated[:count]:
            made.push(token)
        expected = in_float64(logits, prompt, generated[:count], options)
        np.testing.assert_allclose(
            made.adjust(logits), expected, rtol=PENALISED_LOGIT_RELATIVE, atol=1e-5
        )


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("penalty", [1.5, -0.5])
def test_each_penalty_against_float64(texts, name, penalty):
    logits, prompt, generated = texts
    made = processor(prompt, generated, **{name: penalty})
    expected = in_float64(logits, prompt, generated, GenerationOptions(**{name: penalty}))
    np.testing.assert_allclose(made.adjust(logits), expected, rtol=0, atol=1e-5)
    only_prompt = LogitsProcessor(GenerationOptions(**{name: penalty}), prompt)
    assert np.array_equal(only_prompt.adjust(logits), logits)  # the prompt isn't generated


def test_a_bias_forces_and_bans(model):
    [forced] = model.generate("x", max_new_tokens=5, logit_bias={77: 1e4}).prompts
    assert forced.token_ids == [77] * 5
    first = model.generate("x", max_new_tokens=1).prompts[0].token_ids[0]
    [banned] = model.generate("x", max_new_tokens=20, logit_bias={first: -1e4}).prompts
    assert first not in banned.token_ids


def test_logprobs_against_float64(texts):
    logits, prompt, generated = texts
    made = processor(prompt, generated, logprobs=7, repetition_penalty=1.5, temperature=0.5)
    expected = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    for token in (0, int(logits.argmax()), int(logits.argmin())):
        found = made.logprobs(logits, token)
        assert found is not None
        assert found.logprob == pytest.approx(expected[token], abs=LOGPROB)
        ids = [each for each, _ in found.top]
        assert ids == np.argsort(-logits, kind="stable")[:7].tolist()
        np.testing.assert_allclose([value for _, value in found.top], expected[ids], atol=LOGPROB)
    assert processor(prompt, []).logprobs(logits, 0) is None
    assert processor(prompt, [], logprobs=0).logprobs(logits, 3).top == ()


@pytest.mark.parametrize("penalty", [1.0, 1.2, 1.8])
def test_generate_gives_the_tokens_of_transformers(model, tiny_checkpoint, penalty, rng):
    reference = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    prompt = rng.integers(1, model.spec.vocab_size, size=12).tolist()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            repetition_penalty=penalty,
            min_new_tokens=None,
            max_new_tokens=40,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 12:].tolist()
    [found] = model.generate(
        prompt, max_new_tokens=40, repetition_penalty=penalty, ignore_eos=True
    ).prompts
    assert found.token_ids == expected
    assert len(expected) == 40


def test_logprobs_of_a_completion(model):
    options = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    [plain] = model.generate("def main(", **options).prompts
    [completion] = model.generate("def main(", **options, logprobs=3).prompts
    assert completion.token_ids == plain.token_ids  # they change nothing
    assert plain.logprobs == []
    ids = completion.prompt_token_ids + completion.token_ids
    [logits] = model.session().advance(ids, "full", every_position=True)
    rows = logits[len(completion.prompt_token_ids) - 1 : -1].astype(np.float64)
    expected = rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    for row, token, found in zip(expected, completion.token_ids, completion.logprobs, strict=True):
        assert found.logprob == pytest.approx(row[token], abs=LOGPROB)
        top = [value for _, value in found.top]
        np.testing.assert_allclose(top, np.sort(row)[::-1][:3], atol=LOGPROB)


def test_stop_tokens_and_the_models_own_end(model):
    [end] = model.spec.eos_token_ids
    favoured = {"max_new_tokens": 6, "logit_bias": {end: 1e4}}
    [ended] = model.generate("x", **favoured).prompts
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([end], "", "end_of_text")
    [ignored] = model.generate("x", **favoured, ignore_eos=True).prompts
    assert (ignored.token_ids, ignored.finish_reason) == ([end] * 6, "max_new_tokens")
    [free] = model.generate("x", max_new_tokens=20, ignore_eos=True).prompts
    stop = free.token_ids[7]
    at = free.token_ids.index(stop)
    [stopped] = model.generate(
        "x", max_new_tokens=20, ignore_eos=True, stop_token_ids=[stop, 319]
    ).prompts
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert stopped.finish_reason == "stop_token"
    assert free.text.startswith(stopped.text)


CHOICES = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 0.8, "frequency_penalty": -0.3, "exit": 2},
    {"logit_bias": {9: 4.0, 20: -8.0}, "logprobs": 4},
    {"min_p": 0.05, "temperature": 1.1, "seed": 7, "logprobs": 0},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3},
    {"stop_token_ids": list(range(40, 60)), "ignore_eos": True},
    {"stop": ["e", "=="], "logprobs": 2, "exit": 1},
    {"exit": ojfa_export.ExitPolicy(exits=(1, 3), measure="top", thresholds=(0.02, 0.02)),
     "repetition_penalty": 1.3, "logprobs": 1},
]  # fmt: skip


def test_an_engine_gives_what_generate_gives(model, rng):
    prompts = [rng.integers(1, model.spec.vocab_size, size=9).tolist() for _ in CHOICES]
    with ojfa_export.Engine(model, max_sequences=3) as engine:
        running = [
            engine.submit(prompt, GenerationOptions(max_new_tokens=25, **choice))
            for prompt, choice in zip(prompts, CHOICES, strict=True)
        ]
        results = [request.result(TIMEOUT) for request in running]
    for prompt, choice, result in zip(prompts, CHOICES, results, strict=True):
        [alone] = model.generate(prompt, max_new_tokens=25, **choice).prompts
        for name in ("token_ids", "text", "exit_blocks", "finish_reason"):
            assert getattr(result, name) == getattr(alone, name), choice
        assert len(result.logprobs) == len(alone.logprobs)
        for one, other in zip(result.logprobs, alone.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=LOGPROB)
            assert len(one.top) == len(other.top)


def test_two_threads_in_one_session(model, monkeypatch, rng):
    """The second one is told; the first one's logits are right."""
    ids = rng.integers(1, model.spec.vocab_size, size=12).tolist()
    expected = model.session().advance(ids)
    session, inside, go_on = model.session(), threading.Event(), threading.Event()
    embed = session._runner.executor.embed

    def slow(*args):
        inside.set()
        assert go_on.wait(TIMEOUT)
        return embed(*args)

    monkeypatch.setattr(session._runner.executor, "embed", slow)
    logits: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: logits.append(session.advance(ids)))
    thread.start()
    assert inside.wait(TIMEOUT)
    for intrude in (
        lambda: session.advance([1]),
        lambda: session.choose([1]),
        lambda: session.rewind(0),
        lambda: session.deepen(),
    ):
        with pytest.raises(UsageError, match="two threads use one session at the same time"):
            intrude()
    go_on.set()
    thread.join()
    assert np.array_equal(logits[0], expected)
    assert session.tokens() == ids
