"""Sampling against a distribution computed token by token in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import PROBABILITY

from ojfa_export.decoding.sampling import Sampling
from ojfa_export.errors import UsageError

# Multiples of 1/4 make ties frequent.
logits_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=30)


def reference(logits: list[float], temperature: float, top_k: int | None, top_p: float):
    """Takes tokens by likelihood, lower ids first among equals, until k or p is reached."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    total = math.fsum(weights[token] for token in ranked)
    kept: list[int] = []
    for token in ranked:
        if top_p < 1 and math.fsum(weights[t] for t in kept) / total >= top_p:
            break
        kept.append(token)
    mass = math.fsum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


@given(
    logits=logits_lists,
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.floats(0.01, 1).map(lambda p: p + 1e-9 if p < 0.999 else 1.0),
)
@example([0.0, 0.0, 0.0, 0.0], 1.0, None, 0.5)
@example([0.0, 0.0, 0.0, 0.0], 1.0, 2, 1.0)
@example([1.0, 1.0, 1.0, 0.0], 1.0, 1, 0.5)
@example([0.0], 1.0, None, 0.01)
@example([0.0, -9.0, 9.25], 0.5, None, 1.0)  # the last one's share is lost in the sum
def test_probabilities(logits, temperature, top_k, top_p):
    expected = reference(logits, temperature, top_k, top_p)
    probabilities = Sampling(temperature, top_k, top_p).probabilities(np.float32(logits))
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities, expected, atol=PROBABILITY, rtol=0)
    assert probabilities.sum() == pytest.approx(1, abs=PROBABILITY)
    np.testing.assert_array_equal(probabilities > 0, np.array(expected) > 0)


def test_a_tie_at_the_border_keeps_the_lower_ids():
    tied = np.zeros(4, np.float32)
    np.testing.assert_array_equal(Sampling(1.0, 2).probabilities(tied), [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(Sampling(1.0, None, 0.5).probabilities(tied), [0.5, 0.5, 0, 0])


@pytest.mark.parametrize("temperature", [1e-300, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = np.array([-3.0, 2.0, 1.99, 0.0], np.float32)
    np.testing.assert_array_equal(Sampling(temperature).probabilities(logits), [0, 1, 0, 0])


@given(logits=logits_lists)
def test_temperature_0_takes_the_first_of_the_largest(logits):
    chosen = Sampling().choose(np.float32(logits), np.random.default_rng(0))
    assert chosen == logits.index(max(logits))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0, seed=3), Sampling(0.7, top_k=5, seed=4), Sampling(1.5, top_p=0.8, seed=5)],
)
def test_draws_follow_the_probabilities(sampling):
    """Pearson's chi-square over 20000 draws; the seeds are fixed, and so is the outcome."""
    logits = np.random.default_rng(sampling.seed).normal(size=12).astype(np.float32)
    expected = 20_000 * np.array(
        reference(logits.tolist(), sampling.temperature, sampling.top_k, sampling.top_p)
    )
    generator = sampling.generator(0)
    draws = [sampling.choose(logits, generator) for _ in range(20_000)]
    counts = np.bincount(draws, minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # The 99.9% point by Wilson and Hilferty (1931): chi-square's cube root is nearly normal.
    freedom = possible.sum() - 1
    spread = 2 / (9 * freedom)
    assert chi_square < freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def test_every_row_and_seed_has_its_own_random_numbers():
    logits = np.zeros(1000, np.float32)

    def draws(seed: int, row: int) -> tuple[int, ...]:
        sampling = Sampling(1.0, seed=seed)
        generator = sampling.generator(row)
        return tuple(sampling.choose(logits, generator) for _ in range(8))

    streams = {(seed, row): draws(seed, row) for seed in (0, 1, 2**40) for row in (0, 1, 2)}
    assert len(set(streams.values())) == len(streams)
    assert all(draws(*key) == stream for key, stream in streams.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and 0 or more, not -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and 0 or more, not nan"),
        ({"temperature": math.inf}, "temperature must be finite and 0 or more, not inf"),
        ({"top_k": 0}, "top-k must be 1 or more, not 0"),
        ({"top_k": -3}, "top-k must be 1 or more, not -3"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top-p must be above 0 and at most 1, not 1.01"),
        ({"top_p": math.nan}, "top-p must be above 0 and at most 1, not nan"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
    ],
)
def test_parameters_out_of_range(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        Sampling(**arguments)
    assert caught.value.hint
