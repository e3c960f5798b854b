"""A check head decides who leaves; tokens are the whole head's, which nobody else pays for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chain import Chain, build_chain
from checked_programs import (
    BATCH,
    MAX_LENGTH,
    check_program,
    checked_tokens,
    programs,
    session_of,
    sure,
    whole_logits,
)
from hypothesis import HealthCheck, given, settings
from shortcut_kinds import split_kind
from tiny_models import VOCAB_SIZE, make_checkpoint
from tolerances import CONFIDENCE, LOGITS_FP32

from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.frugal import FrugalEngines
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.errors import UsageError
from ojfa_export.promises.drift.read import read_text
from ojfa_export.runtime.shadow import Shadow

# Other families, shortcuts and products; GPT-2's exit head has a bias for each token.
CASES = ["llama-gqa-residual", "gpt2-narrow", "phi3-longrope-mlp", "qwen3-block"]
STORED = [f"llama-gqa-residual {storage}" for storage in ("int8", "int4", "fp16", "bf16")]


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    chains: dict[str, Chain] = {}

    def build(case: str) -> Chain:
        if case not in chains:
            name, _, storage = case.partition(" ")
            variant, kind = split_kind(name)
            directory = tmp_path_factory.mktemp(case.replace(" ", "-"))
            quantised = storage.startswith("int")
            form = WeightFormat(storage=storage, group_size=32) if quantised else None
            chains[case] = build_chain(
                make_checkpoint(variant, directory / "checkpoint", seed=3),
                directory,
                kind=kind,
                weights=form,
                precision="fp32" if quantised or not storage else storage,
                max_length=64,
                check_tokens=checked_tokens(),
            )
        return chains[case]

    return build


@pytest.mark.parametrize("case", CASES + STORED)
def test_its_logits_are_the_exit_heads_of_its_tokens(case, chain_of, rng):
    chain = chain_of(case)
    hidden = rng.standard_normal((5, chain.spec.hidden_size), np.float32)
    for exit in session_of(chain).exits:
        expected = chain.engines.logits(hidden, exit)[:, chain.check_tokens]
        given = chain.engines.check_logits(hidden, exit)
        np.testing.assert_allclose(given, expected, atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize("case", CASES)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=programs)
def test_tokens_and_depths_are_those_of_whole_logits(case, chain_of, program):
    chain = chain_of(case)
    check_program(chain, chain.engines, program)


class Counted(ChoosesOnHost):
    """Engines that note which rows each head is asked about."""

    def __init__(self, engines: Any) -> None:
        self._engines, self.asked = engines, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    has_check_head = True

    def logits(self, hidden: Any, blocks_run: int) -> Any:
        self.asked.append(("whole", blocks_run, len(hidden)))
        return self._engines.logits(hidden, blocks_run)

    def check_logits(self, hidden: Any, blocks_run: int) -> Any:
        self.asked.append(("check", blocks_run, len(hidden)))
        return self._engines.check_logits(hidden, blocks_run)


@pytest.mark.parametrize("way", ["choose", "decide"])
def test_rows_that_go_on_never_ask_the_whole_head(way, chain_of, rng):
    chain = chain_of(CASES[0])
    prompts = rng.integers(VOCAB_SIZE, size=(8, 4)).tolist()
    probe = ExitPolicy(exits=(1,), measure="top", thresholds=(9.0,))
    said = session_of(chain, 8).decide(prompts, probe).confidence[0]
    policy = ExitPolicy(exits=(1, 2), measure="top", thresholds=(float(np.sort(said)[5]), 9.0))
    engines = Counted(chain.engines)
    session = session_of(chain, 8, engines)
    getattr(session, way)(prompts, policy)
    # Three leave at the first exit, by one call; none at the second, which is asked about five.
    assert engines.asked == [
        *(("check", 1, 8), ("whole", 1, 3), ("check", 2, 5)),
        ("whole", chain.spec.blocks, 5),
    ]
    stats = session.stats
    assert (stats.checks, stats.exit_heads, stats.final_heads) == (13, 3, 5)
    assert stats.stopped == {1: 3}
    engines.asked.clear()
    session.choose([[1]] * 8, 2)  # a fixed exit asks no check head
    assert engines.asked == [("whole", 2, 8)]


def test_sampled_tokens_are_of_the_whole_head(chain_of, rng):
    chain = chain_of(CASES[1])
    prompts, draws = rng.integers(VOCAB_SIZE, size=(BATCH, 3)).tolist(), rng.random(BATCH).tolist()
    policy = ExitPolicy(exits=(2,), measure="top", thresholds=(0.0,))
    sampling = Sampling(temperature=1.0, top_k=9)
    choice = session_of(chain).choose(prompts, policy, sampling, draws)
    for row, ids in enumerate(prompts):
        assert choice.tokens[row] == sampling.pick(whole_logits(chain, ids, 2), draws[row])


def test_engines_that_keep_one_head_open_check_alike(chain_of):
    chain = chain_of(CASES[0])
    policy = ExitPolicy(exits=(1, 2), measure="margin", thresholds=(0.01, 0.0))
    plain, frugal = (
        session_of(chain, 1, engines).decide([3, 4, 5], policy)
        for engines in (chain.engines, FrugalEngines(chain.open_engines()))
    )
    np.testing.assert_array_equal(plain.confidence, frugal.confidence)
    np.testing.assert_array_equal(plain.logits, frugal.logits)


@pytest.mark.parametrize("case", CASES)
def test_a_text_at_once_is_decided_as_token_by_token(case, chain_of, rng):
    """What replays requests asks the check head too, beyond LongRoPE's switch as before it."""
    chain = chain_of(case)
    ids = rng.integers(VOCAB_SIZE, size=MAX_LENGTH - 1).tolist()
    exits = (1, chain.spec.blocks - 1)
    policy = ExitPolicy(exits=exits, measure="top", thresholds=(0.05, 0.05))
    unit = read_text(session_of(chain, 1), ids, policy, Shadow(1.0, np.random.default_rng(0)))
    session = session_of(chain, 1)
    for index, token in enumerate(ids):
        step = session.decide([token], policy)
        assert unit.blocks_run[index] == step.blocks_run[0]
        # Units hold 16 bits, rounded down.
        np.testing.assert_allclose(unit.confidence[index], step.confidence[:, 0], rtol=2e-3)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]])
def test_confidence_is_of_tokens_that_stopped_there(case, chain_of):
    chain = chain_of(case)
    session = session_of(chain, 1)
    first, *_, last = session.exits
    session.advance([7, 8], first)
    [logits] = session.advance([1, 2, 3], first, every_position=True)
    said = session.confidence(logits, first, "top")
    expected = [sure(row[chain.check_tokens], "top") for row in logits]
    np.testing.assert_allclose(said, expected, atol=CONFIDENCE + LOGITS_FP32)
    [later] = session.advance([4], first, every_position=True)  # asking leaves all as it was
    np.testing.assert_allclose(
        later, whole_logits(chain, [7, 8, 1, 2, 3, 4], first)[None], atol=LOGITS_FP32, rtol=0
    )
    with pytest.raises(UsageError, match=f"the newest 3 tokens have not stopped at exit {last}"):
        session.confidence(logits, last, "top")
    [full] = session.deepen("full", every_position=True)
    assert session.confidence(full, "full", "margin")[0] == pytest.approx(sure(full[0], "margin"))
