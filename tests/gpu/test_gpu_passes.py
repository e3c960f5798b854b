"""Passes of many sequences, and of chunks of any length, against the CPU runtime's logits."""

from __future__ import annotations

import numpy as np
import pytest
from gpu.cases import EXIT
from gpu.test_gpu_session import assert_close

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _one_length_class(case):
    if case.spec.rotary_switch is not None:
        pytest.skip("LongRoPE: compared at the whole length")


@pytest.mark.parametrize("batch", [3, 20, 70])
def test_chunks_of_any_length_in_one_pass(case, decode, rng, batch):
    """More sequences than our kernels take, than one answer has, and than a piece of a prompt."""
    ids = case.expected["token_ids"]
    session = case.session(batch)
    texts = [ids[row % len(ids)] for row in range(batch)]
    at = [0] * batch
    while min(at) < ids.shape[1]:
        # Nothing, one token as in decoding, a few as in drafts, or many as of a prompt.
        new = [int(rng.choice([0, 1, 1, 1, 3, 15])) for _ in range(batch)]
        new = [min(count, ids.shape[1] - start) for count, start in zip(new, at, strict=True)]
        chunks = [
            text[start : start + count].tolist()
            for text, start, count in zip(texts, at, new, strict=True)
        ]
        exit = EXIT if rng.random() < 0.3 else "full"
        kind = "exit" if exit == EXIT else "full"
        for row, logits in enumerate(session.advance(chunks, exit, every_position=True)):
            stop = at[row] + new[row]
            if new[row] and len(logits):
                expected = case.expected[kind][row % len(ids), stop - len(logits) : stop]
                assert_close(case, logits, expected)
        at = [start + count for start, count in zip(at, new, strict=True)]


@pytest.mark.parametrize("batch", [20, 70])
def test_choices_of_many_sequences(case, decode, batch):
    """In fp32 the tokens of the largest logits."""
    ids = case.expected["token_ids"]
    session = case.session(batch)
    session.advance([ids[row % len(ids), : 3 + row % 5].tolist() for row in range(batch)])
    for step in range(4):
        places = [(row % len(ids), 3 + row % 5 + step) for row in range(batch)]
        chosen = session.choose([[int(ids[text, at])] for text, at in places]).tokens
        wanted = [int(case.expected["full"][text, at].argmax()) for text, at in places]
        if case.precision == "fp32":
            assert list(chosen) == wanted
        else:
            assert np.mean(np.array(chosen) == wanted) > 0.7
