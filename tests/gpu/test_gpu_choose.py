"""Tokens, confidence and sampling by kernels, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import CONFIDENCE

from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.sampling import GREEDY, Sampling

pytestmark = pytest.mark.gpu
MEASURES: tuple[Measure, ...] = ("top", "margin", "entropy")
# Fewer than there are parts, one to each, odd, published.
VOCABULARIES = (1, 5, 31, 32, 263, 32_000, 50_257, 128_256)


@pytest.fixture(scope="module")
def gpu():
    """The device, and the choosing kernels compiled for it."""
    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels

    device = the_device()
    macros = {
        "HALF": 0,
        "HEAD_DIM": 16,
        "HEADS": 1,
        "KV_HEADS": 1,
        "ROTARY_DIM": 0,
        "WINDOW": 0,
        "NORM_LAYER": 0,
        "ACTIVATION": 0,
        "GATED": 0,
    }
    return device, Kernels(device, compile_kernels(macros, device.compute_capability))


def answers(gpu, logits, sampling=GREEDY, draws=()):
    """What the kernels choose of logits [rows, V]."""
    from ojfa_export.backends.cuda.arrays import DeviceArrays
    from ojfa_export.backends.cuda.choosing import Chooser
    from ojfa_export.backends.cuda.mailbox import HeadArguments, Mailbox
    from ojfa_export.decoding.head_output import HeadRequest

    device, kernels = gpu
    mailbox = Mailbox(device)
    chooser = Chooser(kernels, mailbox, logits.shape[1])
    asked = HeadArguments.of(HeadRequest(sampling, draws))
    held = DeviceArrays(device).asarray(logits.astype(np.float32))
    mailbox.leave(HeadRequest(sampling, draws))
    chooser.choose(held, asked)
    device.recorder.launches += 1
    choices = mailbox.expect(len(logits))
    choices.answers()
    return choices


def confidences64(logits):
    """As `decoding.confidence.confidence` defines them, in float64 throughout."""
    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    p = np.exp(below) / np.exp(below).sum(axis=1, keepdims=True)
    ranked = np.sort(p, axis=1)
    margin = ranked[:, -1] - (ranked[:, -2] if p.shape[1] > 1 else 0)
    entropy = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=1)
    return {"top": ranked[:, -1], "margin": margin, "entropy": entropy}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("scale", [0.01, 3.0, 200.0])
def test_tokens_and_confidence(gpu, rng, vocabulary, scale):
    for rows in (1, 3, 16):
        logits = (scale * rng.normal(size=(rows, vocabulary))).astype(np.float32)
        choices = answers(gpu, logits)
        assert choices.tokens() == choices.likeliest() == logits.argmax(axis=1).tolist()
        for measure, expected in confidences64(logits).items():
            np.testing.assert_allclose(
                choices.confidence(measure), expected, atol=CONFIDENCE, rtol=0
            )


def test_ties_go_to_the_lowest_token(gpu, rng):
    logits = rng.integers(-3, 4, size=(16, 5000)).astype(np.float32)
    choices = answers(gpu, logits)
    assert choices.tokens() == logits.argmax(axis=1).tolist()
    assert not any(choices.confidence("margin"))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7, top_k=40),
        Sampling(1.3, top_p=0.9),
        Sampling(2.0, top_k=50, top_p=0.5),
        Sampling(1.0, top_k=1),
        Sampling(1e-5),
        Sampling(1e-300),
    ],
)
def test_sampled_tokens_are_those_of_the_host(gpu, rng, vocabulary, sampling):
    """The same token for the same draw, but where the draw lies at the border of two."""
    logits = (3 * rng.normal(size=(16, vocabulary))).astype(np.float32)
    logits[8:] = np.round(logits[8:] * 2) / 2  # with many ties
    logits[14:] = logits[14:, :1]  # nothing else
    draws = rng.random(16)
    tokens = answers(gpu, logits, sampling, draws.tolist()).tokens()
    for row, token in enumerate(tokens):
        shares = np.cumsum(sampling.probabilities(logits[row]))
        low, high = (shares[token - 1] if token else 0.0), shares[token]
        assert low - 1e-5 <= draws[row] <= high + 1e-5
        assert (
            token == sampling.pick(logits[row], draws[row])
            or high - low < 1e-4
            or min(abs(draws[row] - low), abs(draws[row] - high)) < 1e-5
        )


def test_answers_come_in_order(gpu, rng):
    """More of them than there are places, read one by one."""
    for _ in range(20):
        logits = rng.normal(size=(2, 300)).astype(np.float32)
        assert answers(gpu, logits).tokens() == logits.argmax(axis=1).tolist()
