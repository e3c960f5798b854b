"""What the planner knows of a draft layer: rounds that are timed, and drafts that are counted."""

from __future__ import annotations

import numpy as np
import pytest
from chain import build_chain
from drafts import GoodDrafts, draft_for, open_draft
from known_costs import ClockedEngines, step_costs
from test_recommend import agreeing
from tiny_models import make_checkpoint

from ojfa_export.planning.drafting import LayerDrafting, measure_acceptance, measure_layer
from ojfa_export.planning.frontier import layer_speculation
from ojfa_export.planning.plan import make_plan, plan_default
from ojfa_export.system.progress import SILENT

ACCEPTANCE = (0.5, 0.3, 0.2, 0.1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A chain, and the opened draft layer of one."""
    directory = tmp_path_factory.mktemp("chain")
    checkpoint = make_checkpoint("llama-gqa", directory / "checkpoint", seed=5)
    chain = build_chain(checkpoint, directory / "bundle", max_length=100)
    return chain, open_draft(chain, draft_for(chain.spec, seed=6), directory / "draft")


def test_tokens_of_a_round():
    drafting = LayerDrafting(round=1.0, each=0.1, acceptance=ACCEPTANCE)
    assert drafting.tokens(0) == 1
    assert drafting.tokens(3) == pytest.approx(2.0)
    assert drafting.tokens(6) == pytest.approx(2.1 + 0.05 + 0.025)
    assert LayerDrafting(round=1.0, each=0.1, acceptance=(0.0, 0.0)).tokens(8) == 1


def test_rounds_are_timed_as_they_run(parts):
    """The checks' rows; the layer itself takes no time on this clock."""
    chain, layer = parts
    engines = ClockedEngines(chain.engines)
    found = measure_layer(
        chain.spec, engines, layer, ACCEPTANCE, 40, 3, 1e9, SILENT, clock=engines.clock
    )  # fmt: skip
    blocks = chain.spec.blocks
    assert found.each == pytest.approx(0.25 * blocks + 0.1)
    assert found.round == pytest.approx(0.1 + 1.5 * blocks + 0.4)
    assert found.acceptance == ACCEPTANCE


def test_drafts_that_are_taken_are_counted(parts):
    """Wrong in every third position: two are taken of nearly every round, and never a third."""
    chain, layer = parts
    rng = np.random.default_rng(5)
    prompts = rng.integers(chain.spec.vocab_size, size=(2, 4)).tolist()
    texts = []
    for prompt in prompts:
        session = chain.session(1, 100)
        text = [*prompt, int(session.advance(prompt)[0].argmax())]
        while len(text) < 80:
            text.append(int(session.advance(text[-1:])[0].argmax()))
        texts.append(text)
    good = measure_acceptance(
        chain.spec, chain.engines, GoodDrafts(layer, texts), prompts, 100, SILENT
    )
    assert good[1] > 0.8
    assert good[2:] == (0.0, 0.0)
    poor = measure_acceptance(chain.spec, chain.engines, layer, prompts, 100, SILENT)
    assert len(poor) == 4
    assert poor[0] < 0.5


def test_nothing_is_counted_behind_the_end_of_text(parts):
    """Drafts that are mostly right up to an end of text, and know nothing behind it."""
    chain, layer = parts
    session, text = chain.session(1, 100), [7]
    while len(text) < 80:
        text.append(int(session.advance(text[-1:])[0].argmax()))
    end = next(at for at in range(12, 80) if text[at] not in text[:at])
    found = []
    for eos in ((), (text[end],)):
        spec = chain.spec.model_copy(update={"eos_token_ids": eos})
        drafts = GoodDrafts(layer, [text[: end + 1]])
        found.append(measure_acceptance(spec, chain.engines, drafts, [text[:2]], 100, SILENT)[0])
    behind, before = found
    assert before > 0.7
    assert behind < 0.4


def test_what_a_point_costs_is_a_round_over_its_tokens():
    costs = step_costs(drafting=LayerDrafting(round=13.0, each=1.0, acceptance=ACCEPTANCE))
    points = layer_speculation(12, costs)
    assert [point.exit for point in points] == [0] * 8
    assert points[1].ms == pytest.approx((13.0 + 2 * 1.0) / 1.8)
    assert points[1].blocks == pytest.approx(3 * 12 / 1.8)
    assert layer_speculation(12, step_costs()) == []


def test_the_draft_layer_is_the_default_where_it_pays():
    cheap = step_costs(drafting=LayerDrafting(round=13.0, each=0.5, acceptance=ACCEPTANCE))
    found = plan_default(agreeing(0.3), cheap, None)
    assert found.speculation is not None
    assert found.speculation.exit == 0
    assert found.speculation.acceptance == 0.5
    assert found.speculation.draft == 4  # as many as were planned
    full = cheap.full
    assert found.speculation.draft_cost == pytest.approx(0.5 / full)
    assert found.speculation.round_cost == pytest.approx(13.0 / full - 1)
    assert "draft layer" in found.reason
    dear = step_costs(drafting=LayerDrafting(round=20.0, each=5.0, acceptance=ACCEPTANCE))
    assert plan_default(agreeing(0.3), dear, None).speculation is None
    assert "draft layer" in " ".join(make_plan(agreeing(0.3), cheap, None, 0.95).advice)
