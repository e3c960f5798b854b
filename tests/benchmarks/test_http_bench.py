"""`bench.serving.http`: the same tokens both ways, and figures that are what they say."""

from __future__ import annotations

import pytest
from vectors.cases import DIRECTORY

import ojfa_export
from bench.serving.http import Samples, Timed, figures, measure


def test_both_ways_are_measured():
    bundle = DIRECTORY / "llama.ojfa"
    samples = measure(ojfa_export.load(bundle), bundle, rounds=1, tokens=8)
    assert [len(samples.rates[name]) for name in ("engine", "http")] == [1, 1]
    assert all(len(each) == 1 and each[0] > 0 for each in samples.processor.values())
    assert all(each.tokens == 8 for runs in samples.alone.values() for each in runs)


def test_figures_are_ratios_and_differences_of_medians():
    samples = Samples(
        {"engine": [90.0, 100.0, 500.0], "http": [96.0, 1.0, 97.0]},
        {"engine": [Timed(0.01, 0.002, 8)] * 3, "http": [Timed(0.012, 0.0022, 8)] * 3},
        {"server": [30.0, 20.0, 90.0], "client": [9.0, 10.0, 11.0]},
    )
    found = figures(samples)
    assert found["share_of_engine"] == pytest.approx(0.96)
    assert found["added_to_first_token_ms"] == pytest.approx(2)
    assert found["added_between_tokens_ms"] == pytest.approx(0.2)
    assert found["processor_us_per_token_server"] == 30
    assert found["processor_us_per_token_client"] == 10
