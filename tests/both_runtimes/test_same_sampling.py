"""Tokens are drawn from the same distributions in Python and in C++."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
from both_runtimes.compare import InCpp
from both_runtimes.settings import SEED, examples, needs_programs, program
from hypothesis import strategies as st
from tolerances import PROBABILITY

from ojfa_export.decoding.sampling import Sampling
from ojfa_export.errors import UsageError

pytestmark = needs_programs

EXAMPLES = 1500

# Multiples of 1/4 make ties frequent; far ones are lost in the sum of the others.
some_logits = st.lists(
    st.integers(-80, 80).map(lambda n: n / 4) | st.floats(-40, 40, width=32),
    min_size=1,
    max_size=12,
)
right = {
    "temperature": st.floats(0.05, 5) | st.sampled_from([1.0, 1e-300, 0.0]),
    "top_k": st.none() | st.integers(1, 14),
    "top_p": st.just(1.0) | st.floats(0.01, 1) | st.sampled_from([0.5, 1e-9]),
}
wrong = {
    "temperature": st.just(-0.5),
    "top_k": st.sampled_from([0, -1]),
    "top_p": st.sampled_from([0.0, 1.5]),
}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    case = {name: draw(values) for name, values in right.items()}
    if draw(st.integers(0, 31)) == 31:
        name = draw(st.sampled_from(sorted(wrong)))
        case[name] = draw(wrong[name])
    number = st.floats(0, 1, exclude_max=True)
    return case | {"logits": draw(some_logits), "draw": draw(number)}


@pytest.fixture
def cpp() -> Iterator[InCpp]:
    opened = InCpp([program("replay_sampling")])
    yield opened
    opened.close()


def is_near_border(sampling: Sampling, logits: np.ndarray, draw: float) -> bool:
    """Whether rounding decides where top-p cuts, or between which tokens a draw lies."""
    shares = np.cumsum(sampling.probabilities(logits))
    if np.abs(shares / shares[-1] - draw).min() < PROBABILITY:
        return True
    if sampling.top_p == 1:
        return False
    uncut = Sampling(sampling.temperature, sampling.top_k).probabilities(logits)
    sums = np.cumsum(np.sort(uncut)[::-1])
    return bool(np.abs(sums - sampling.top_p).min() < PROBABILITY)


def test_random_sampling(cpp: InCpp) -> None:
    done = {"cases": 0, "refused": 0, "near a border": 0}

    @hypothesis.seed(SEED)
    @examples(EXAMPLES)
    @hypothesis.given(cases())
    def compare(case: dict[str, Any]) -> None:
        done["cases"] += 1
        logits, theirs = np.float32(case["logits"]), cpp.answer_to(case)
        where = f"of {json.dumps(case)}"
        sampling = None
        with contextlib.suppress(UsageError):
            sampling = Sampling(case["temperature"], case["top_k"], case["top_p"])
        refused = sampling is None
        assert refused == ("error" in theirs), f"Python refuses: {refused}, C++: {theirs}, {where}"
        if sampling is None:
            done["refused"] += 1
            return
        if not sampling.temperature:
            assert theirs["token"] == sampling.pick(logits, case["draw"]), where
            return
        if is_near_border(sampling, logits, case["draw"]):
            done["near a border"] += 1
            return
        mine = sampling.probabilities(logits)
        both = f"Python's probabilities {mine.tolist()}, C++'s {theirs['probabilities']}, {where}"
        assert [x > 0 for x in theirs["probabilities"]] == (mine > 0).tolist(), both
        np.testing.assert_allclose(theirs["probabilities"], mine, PROBABILITY, 0, err_msg=both)
        assert theirs["token"] == sampling.pick(logits, case["draw"]), where

    compare()
    print(done)
