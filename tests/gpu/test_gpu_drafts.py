"""Draft layers on the GPU against the CPU runtime's logits, and drafting against full depth."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gpu.cases import DRAFT_PROMPT, DRAFTED, DRAFTS
from tolerances import DRAFT_BF16_RELATIVE, DRAFT_FP16_RELATIVE, DRAFT_FP32_RELATIVE

from ojfa_export.backends.draft import DraftLayer
from ojfa_export.bundle.names import DRAFT_GRAPHS
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator

pytestmark = pytest.mark.gpu
RELATIVE = {
    "fp32": DRAFT_FP32_RELATIVE,
    "fp16": DRAFT_FP16_RELATIVE,
    "bf16": DRAFT_BF16_RELATIVE,
}
# How near the likeliest a token is that rounding may have made the likeliest, of the largest.
NEAR = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.15}


@pytest.fixture(scope="session", params=DRAFTS)
def drafting(request, cases, tmp_path_factory):
    """A case, its opened draft layer, and what the CPU runtime computed with that."""
    from ojfa_export.backends.tensorrt.backend import BACKEND

    case = cases(request.param)
    described = json.loads((case.directory / "draft.json").read_text())
    spec = ModelSpec.model_validate_json(json.dumps(described["spec"]))
    built = tmp_path_factory.mktemp(f"{request.param}-draft")
    plans = {name: built / f"{name}.json" for name in DRAFT_GRAPHS}
    for name, plan in plans.items():
        BACKEND.build_engine(spec, case.graphs / f"{name}.onnx", plan)
    with np.load(case.directory / "draft.npz") as arrays:
        expected = dict(arrays)
    layer = DraftLayer(
        depths=tuple(described["depths"]),
        spec=spec,
        vocab_size=case.spec.vocab_size,
        tokens=expected.get("tokens"),
        weights=case.graphs,
        engines=plans,
        rotary=(expected["cos"], expected["sin"]),
    )
    engines = case.engines()
    return case, engines, BACKEND.open_draft(engines, layer), expected


def session_of(drafting, batch: int = 1) -> Session:
    case, engines, drafts, expected = drafting
    return Session(case.spec, engines, batch, 2 * len(expected["token_ids"]), drafts=drafts)


def test_logits_are_those_of_the_cpu(drafting):
    """After a prompt in two pieces, and along a chain; three times, so that recordings run."""
    case, _, _, expected = drafting
    session, ids = session_of(drafting), expected["token_ids"].tolist()
    relative = RELATIVE[case.precision]
    for _ in range(3):
        session.rewind(0)
        session.advance(ids[: DRAFT_PROMPT // 2])
        session.propose_logits([ids[DRAFT_PROMPT // 2 :][:1]])
        session.rewind(DRAFT_PROMPT // 2)
        session.advance(ids[DRAFT_PROMPT // 2 : DRAFT_PROMPT])
        for at in range(DRAFTED):
            token = ids[DRAFT_PROMPT + at]
            found, wanted = session.propose_logits([[token]])[0], expected["logits"][at]
            known = np.isfinite(wanted)
            assert (np.isfinite(found) == known).all()
            error = np.abs(found[known] - wanted[known]).max()
            assert error < relative * np.abs(wanted[known]).max()


def test_chains_are_those_step_by_step(drafting):
    """Drafts of one launch, and those of the same layer with the host in between."""
    stepwise, chained = session_of(drafting), session_of(drafting)
    ids = drafting[3]["token_ids"].tolist()
    for each in (stepwise, chained):
        each.advance(ids[:DRAFT_PROMPT])
    for round in range(6):
        before, token = chained.lengths[0], ids[DRAFT_PROMPT + round]
        drafts, _ = chained.propose_and_complete([[token]], [4])
        expected: list[int] = []
        for _ in range(4):
            [token] = stepwise.propose([[token]])
            expected.append(token)
        stepwise.complete_greedily([expected[-1:]], [5])
        assert drafts[0] == expected
        for each in (stepwise, chained):
            each.rewind(before + 1 + round % 3)


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_full_depth(drafting, batch):
    """Up to near ties, which passes of other numbers of tokens may decide otherwise."""
    case, engines, _, expected = drafting
    session, ids = session_of(drafting, batch), expected["token_ids"].tolist()
    prompts = [ids[row : DRAFT_PROMPT - row] for row in range(batch)]
    generators = [np.random.default_rng(0)] * batch
    speculator = Speculator(session, Speculation(0, 3), Sampling(), generators)
    tokens: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    while min(map(len, tokens)) < 40:
        for row, given in enumerate(speculator.step(pending, [40] * batch)):
            tokens[row] += [token.id for token in given]
            pending[row] = tokens[row][-1:]
    for prompt, given in zip(prompts, tokens, strict=True):
        plain = Session(case.spec, engines, 1, 2 * len(ids))
        [logits] = plain.advance([[*prompt, *given[:40]]], every_position=True)
        for at, token in enumerate(given[:40]):
            row = logits[len(prompt) - 1 + at]
            near = NEAR[case.precision] * np.abs(row).max()
            assert row.max() - row[token] <= near
