"""Random steps of exits that a check head decides, compared with whole logits in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chain import Chain
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE
from tolerances import CONFIDENCE, LOGITS_FP32

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.runtime.session import Session

# Of a check head, sequences, and tokens of each.
SIZE, BATCH, MAX_LENGTH = 40, 3, 40

threshold = st.sampled_from([0.0, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 1.1])
steps = st.tuples(
    st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3), min_size=BATCH, max_size=BATCH)
    | st.just([[5]] * BATCH),
    st.dictionaries(st.integers(1, 3), threshold, max_size=3),
    st.sampled_from(["top", "margin"]),
)
programs = st.lists(steps, min_size=1, max_size=5)


def checked_tokens() -> np.ndarray:
    """Ids of a check head."""
    chosen = np.random.default_rng(5).choice(VOCAB_SIZE, SIZE, replace=False)
    return np.sort(chosen).astype(np.int32)


def session_of(chain: Chain, batch: int = BATCH, engines: Any = None) -> Session:
    return Session(chain.spec, engines or chain.engines, batch, MAX_LENGTH)


def sure(logits: np.ndarray, measure: str) -> float:
    """Confidence of one row, in float64."""
    log = logits.astype(np.float64)
    log = log - np.logaddexp.reduce(log)
    if measure == "entropy":
        return float((np.exp(log) * log).sum())
    second, first = np.sort(np.exp(log))[-2:]
    return float(first - second if measure == "margin" else first)


def whole_logits(chain: Chain, ids: list[int], exit: int) -> np.ndarray:
    """Of the whole head on the CPU, in a fresh session."""
    return session_of(chain, 1).advance(ids, exit)[0]


def check_program(chain: Chain, engines: Any, program: list) -> None:
    """Who leaves follows from the whole head's logits of the check head's tokens, in NumPy."""
    session, ids = session_of(chain, BATCH, engines), [[] for _ in range(BATCH)]
    chosen = session_of(chain, BATCH, engines)
    for new, exits, measure in [*program, ([[1]] * BATCH, {2: 0.0}, "top")]:
        room = min(MAX_LENGTH - max(map(len, ids)), 3)
        new = [each[:room] for each in new]
        asked = sorted(exit for exit in exits if exit in session.exits)
        policy = ExitPolicy(
            exits=asked, measure=measure, thresholds=[exits[exit] for exit in asked]
        )
        step, choice = session.decide(new, policy), chosen.choose(new, policy)
        for row, added in enumerate(new):
            ids[row] += added
            if not added:
                assert step.blocks_run[row] == choice.blocks_run[row] == 0
                continue
            depth = int(step.blocks_run[row])
            for index, (exit, least) in enumerate(
                zip(policy.exits, policy.thresholds, strict=True)
            ):
                said = step.confidence[index, row]
                assert np.isnan(said) == (exit > depth)
                if exit > depth:
                    continue
                whole = whole_logits(chain, ids[row], exit)
                expected = sure(whole[chain.check_tokens], measure)
                # A softmax moves by no more than its logits.
                assert said == pytest.approx(expected, abs=CONFIDENCE + LOGITS_FP32)
                assert (said >= least) == (exit == depth)
            expected = whole_logits(chain, ids[row], depth)
            np.testing.assert_allclose(step.logits[row], expected, atol=LOGITS_FP32, rtol=0)
            assert choice.tokens[row] == step.logits[row].argmax()
            assert choice.blocks_run[row] == depth
        if any(new):  # a choice of nothing knows of no exits
            np.testing.assert_allclose(choice.confidence, step.confidence, atol=CONFIDENCE, rtol=0)
