"""The chain of blocks against transformers in fp32, for every variant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_models import POSITIONS, VARIANTS, VOCAB_SIZE
from tokenizers import Tokenizer
from tolerances import LOGITS_FP32
from transformers_logits import full_forward, longrope_decode

from ojfa_export.decoding.sampling import Sampling
from ojfa_export.runtime.generation import Settings, generate_tokens

LENGTH = 44  # beyond every original length (32) and every window (8)
SWITCH = 32  # LongRoPE's
LONGROPE = ("phi3-longrope", "phi4-mini")
# Those that go on beyond the trained length; dynamic scaling has a test of its own.
UNBOUNDED = [name for name in VARIANTS if name != "llama-rope-dynamic"]


@pytest.fixture
def token_ids(rng) -> list[int]:
    return rng.integers(VOCAB_SIZE, size=LENGTH).tolist()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_one_advance(name, chain_of, model_of, token_ids):
    [logits] = chain_of(name).session().advance(token_ids, every_position=True)
    assert_close(logits, full_forward(model_of(name), token_ids))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_token_by_token(name, chain_of, model_of, token_ids):
    session = chain_of(name).session()
    logits = np.concatenate([session.advance([token]) for token in token_ids])
    assert_close(logits, decode_reference(name, model_of(name), token_ids))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_prompt_in_chunks(name, chain_of, model_of, token_ids, rng):
    ids = token_ids[:SWITCH] if name in LONGROPE else token_ids
    cuts = [0, *sorted(rng.choice(np.arange(1, len(ids)), 3, replace=False).tolist()), len(ids)]
    session = chain_of(name).session()
    logits = [
        session.advance(ids[start:stop], every_position=True)[0]
        for start, stop in itertools.pairwise(cuts)
    ]
    assert_close(np.concatenate(logits), full_forward(model_of(name), ids))


def test_dynamic_scaling_up_to_the_trained_length(chain_of, model_of, rng):
    name, length = "llama-rope-dynamic", 32
    ids = rng.integers(VOCAB_SIZE, size=length).tolist()
    expected = full_forward(model_of(name), ids)
    session = chain_of(name).session()
    assert_close(session.advance(ids, every_position=True)[0], expected)
    session.rewind(0)
    assert_close(np.concatenate([session.advance([token]) for token in ids]), expected)


def test_longrope_crosses_its_switch_length_in_both_directions(chain_of, model_of, token_ids):
    session, model = chain_of("phi3-longrope").session(), model_of("phi3-longrope")
    session.advance(token_ids[: SWITCH - 4])
    # Over it within one advance: every position as in a forward of the whole sequence.
    [logits] = session.advance(token_ids[SWITCH - 4 : SWITCH + 4], every_position=True)
    assert_close(logits, full_forward(model, token_ids[: SWITCH + 4])[SWITCH - 4 :])
    # Below it again: as if the long sequence had never been.
    session.rewind(SWITCH - 2)
    logits = session.advance(token_ids[SWITCH - 2 : SWITCH])[0]
    assert_close(logits, full_forward(model, token_ids[:SWITCH])[-1])
    # And once more, by one token.
    logits = session.advance(token_ids[SWITCH : SWITCH + 1])[0]
    assert_close(logits, full_forward(model, token_ids[: SWITCH + 1])[-1])


@pytest.mark.parametrize("exit", [1, 2])
def test_longrope_crosses_its_switch_length_at_an_exit(exit, chain_of, token_ids):
    chain = chain_of("phi3-longrope")
    session = chain.session()
    session.advance(token_ids[: SWITCH - 1], exit)
    for end in range(SWITCH, SWITCH + 3):
        logits = session.advance(token_ids[end - 1 : end], exit)
        assert_close(logits, chain.session().advance(token_ids[:end], exit))
    session.rewind(SWITCH - 5)
    logits = session.advance(token_ids[SWITCH - 5 : SWITCH - 3], exit)
    assert_close(logits, chain.session().advance(token_ids[: SWITCH - 3], exit))


@pytest.mark.parametrize("name", UNBOUNDED)
def test_greedy_tokens_are_the_argmax_of_transformers(name, chain_of, model_of, rng):
    """128 tokens from a prompt of one, up to the end of the cache."""
    prompt = [int(rng.integers(VOCAB_SIZE))]
    tokens = greedy(chain_of(name), prompt)
    fed = [*prompt, *tokens[:-1]]
    assert len(tokens) == len(fed) == POSITIONS
    expected = decode_reference(name, model_of(name), fed)
    compared = 0
    for token, logits in zip(tokens, expected, strict=True):
        if is_clear(logits):
            assert token == logits.argmax()
            compared += 1
    assert compared > POSITIONS // 2


@pytest.mark.parametrize("name", UNBOUNDED)
def test_greedy_tokens_are_those_of_generate(name, chain_of, model_of, rng):
    """To beyond every switching length and window; the test before this goes to the cache's end."""
    prompt = [int(rng.integers(VOCAB_SIZE))]
    tokens = greedy(chain_of(name), prompt, LENGTH)
    model = model_of(name)
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        max_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = output.sequences[0, 1:].tolist()
    assert len(expected) == len(tokens) == LENGTH
    for step, logits in enumerate(output.logits):
        if not is_clear(logits[0].numpy()):
            break  # either token may be chosen, and all later ones depend on it
        assert tokens[step] == expected[step], step


@pytest.mark.parametrize(
    "name",
    ["gemma2", "gemma3_text", "gpt2", "llama-gqa", "phi3-sliding-window", "phi3-longrope"],
)
def test_a_batch_is_its_sequences_alone(name, chain_of, rng):
    chain = chain_of(name)
    prompts = [rng.integers(VOCAB_SIZE, size=size).tolist() for size in (20, 1, 33, 31, 9)]
    batch = chain.session(len(prompts))
    alone = [chain.session() for _ in prompts]
    expected = [s.advance(p)[0] for s, p in zip(alone, prompts, strict=True)]
    assert_close(batch.advance(prompts), expected)
    for step in range(6):
        tokens = rng.integers(VOCAB_SIZE, size=(len(prompts), 1)).tolist()
        exit = 2 if step in (2, 3) else "full"
        expected = [s.advance(t, exit)[0] for s, t in zip(alone, tokens, strict=True)]
        assert_close(batch.advance(tokens, exit), expected)


def test_every_position_of_a_batch(chain_of, model_of, rng):
    """Also of single tokens, which run as one group."""
    session, model = chain_of("llama-gqa").session(3), model_of("llama-gqa")
    ids = rng.integers(VOCAB_SIZE, size=(3, 12)).tolist()
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits = session.advance([row[start:stop] for row in ids], every_position=True)
        for row, result in zip(ids, logits, strict=True):
            assert_close(result, full_forward(model, row[:stop])[start:])


def decode_reference(name, model, token_ids: list[int]) -> np.ndarray:
    """Logits of a decode, for the rotation that depends on a sequence's length too."""
    if name in LONGROPE:
        return longrope_decode(model, token_ids, SWITCH)
    return full_forward(model, token_ids)


def is_clear(logits: np.ndarray) -> bool:
    """Whether the best token leads by more than two tolerances."""
    second, first = np.partition(logits, -2)[-2:]
    return bool(first - second > 2 * LOGITS_FP32)


def greedy(chain, prompt: list[int], count: int = POSITIONS) -> list[int]:
    settings = Settings("full", count, Sampling(), (), ())
    tokenizer = Tokenizer.from_file(str(chain.checkpoint.directory / "tokenizer.json"))
    return [t.id for t in generate_tokens(chain.session(), [prompt], tokenizer, settings)]
