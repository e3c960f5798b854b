"""Check heads on the GPU against rows of the whole head; exits that they decide, of many sequences.

Steps that begin ahead, with exits that a check head or a block decides, are in `test_gpu_session`.
"""

from __future__ import annotations

import numpy as np
import pytest
from gpu.cases import CHECKED
from gpu.test_gpu_session import assert_close
from tolerances import TWO_KERNELS

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.runtime.decoding import StepByStep

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _checked(case):
    if case.name not in CHECKED:
        pytest.skip("has no check head")


@pytest.mark.parametrize("rows", [1, 2, 7, 20, 70])
def test_its_logits_are_rows_of_the_exit_head(case, decode, rng, rows):
    engines, tokens = case.engines(), case.expected["check_tokens"]
    hidden = rng.standard_normal((rows, case.spec.hidden_size), np.float32)
    for exit in case.session().exits:
        whole = engines.logits(hidden, exit)
        assert_close(case, engines.check_logits(hidden, exit), whole[:, tokens])


@pytest.mark.parametrize("batch", [1, 2, 3, 20, 70])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=30, seed=1)])
def test_steps_that_it_decides(case, decode, rng, batch, sampling):
    """Text whose next step begins before the last token is known, against logits of single steps.

    Some leave at each exit; their token is the whole head's.
    """
    ids = case.expected["token_ids"]
    prompts = [ids[row % len(ids), : 4 + row % 3].tolist() for row in range(batch)]
    exits = case.session().exits
    never = ExitPolicy(exits=exits, measure="top", thresholds=(9.0,) * len(exits))
    said = case.session(batch).decide(prompts, never).confidence
    policy = never.model_copy(update={"thresholds": tuple(0.999 * np.median(said, axis=1))})
    session, plain = case.session(batch), case.session(batch)
    generators = [sampling.generator(row) for row in range(batch)]
    decoder = StepByStep(session, policy, sampling, generators)
    pending, depths = prompts, set()
    for step in range(10):
        chosen = decoder.step(pending, [10 - step] * batch)
        expected = plain.decide(pending, policy)
        for row, [token] in enumerate(chosen):
            logits = expected.logits[row]
            depths.add(int(expected.blocks_run[row]))
            margin = TWO_KERNELS[case.precision] * np.abs(logits).max()
            if case.precision == "fp32":
                assert token.blocks_run == expected.blocks_run[row]
            if not sampling.temperature and token.blocks_run == expected.blocks_run[row]:
                assert logits.max() - logits[token.id] <= margin
        pending = [[token.id for token in each] for each in chosen]
    decoder.end()
    if case.precision == "fp32":
        assert session.watermarks.tolist() == plain.watermarks.tolist()
    assert len(depths) > 1 or batch == 1
