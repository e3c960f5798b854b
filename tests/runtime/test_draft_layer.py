"""A session drafts with a draft layer as its definition says, whatever happened before."""

from __future__ import annotations

import numpy as np
import pytest
from drafts import draft_for, open_draft
from test_session import NAMES, poison
from tiny_models import VOCAB_SIZE
from tolerances import DRAFT_FP32_RELATIVE

from ojfa_export.bundle.onnx_file import read_onnx
from ojfa_export.errors import UsageError
from ojfa_export.runtime.session import Session

MAX_LENGTH = 40


@pytest.fixture(scope="module", params=[*NAMES, "gemma2"])
def parts(request, chain_of, tmp_path_factory):
    """A chain, a draft layer of it, and the opened layer."""
    chain = chain_of(request.param)
    draft = draft_for(chain.spec, seed=5, own_head=request.param not in ("gpt2", "gemma2"))
    return chain, draft, open_draft(chain, draft, tmp_path_factory.mktemp("draft"))


def embeddings(chain) -> np.ndarray:
    """The model's token embedding [V, H]."""
    tensor = read_onnx((chain.graphs / "embed.onnx").read_bytes()).tensors["token_embedding"]
    path = chain.graphs / tensor.location
    return np.memmap(path, np.float32, "r", tensor.offset, tensor.shape)


def lm_head(chain) -> np.ndarray:
    tensor = read_onnx((chain.graphs / "final_head.onnx").read_bytes()).tensors["head"]
    path = chain.graphs / tensor.location
    return np.memmap(path, np.float32, "r", tensor.offset, tensor.shape)


def expected_logits(chain, draft, tokens: list[int], drafts: list[int]) -> np.ndarray:
    """Logits [V] after some tokens, the newest of which has not run, and drafts after it."""
    states = []
    for depth in draft.depths:
        session = Session(chain.spec, chain.engines, 1, MAX_LENGTH)
        session.advance(tokens[:-1], depth)
        states.append(hidden_of(session, depth))
    table = embeddings(chain).astype(np.float64)
    memory = draft.memory(np.concatenate(states, axis=1).astype(np.float64))
    outputs, past = draft.apply(memory, table[tokens[1:]])
    for token in drafts:
        outputs, past = draft.apply(outputs[-1:], table[[token]], past)
    logits = np.full(chain.spec.vocab_size, -np.inf)
    own = draft.logits(outputs[-1], lm_head(chain).astype(np.float64))
    logits[slice(None) if draft.tokens is None else draft.tokens] = own
    return logits


def hidden_of(session: Session, depth: int) -> np.ndarray:
    """Hidden states of a session's first sequence after some blocks, in which it has just run."""
    runner = session._runner
    if depth < session.spec.blocks:
        return runner.pending[depth][0, : session.lengths[0]].copy()
    return runner._newest.hidden.copy()


def check(chain, draft, found: np.ndarray, tokens: list[int], drafts: list[int]) -> None:
    expected = expected_logits(chain, draft, tokens, drafts)
    drafted = np.isfinite(expected)
    assert (np.isfinite(found) == drafted).all()
    largest = np.abs(expected[drafted]).max()
    assert np.abs(found[drafted] - expected[drafted]).max() < DRAFT_FP32_RELATIVE * largest


def test_chains_are_those_of_the_definition_whatever_came_before(parts, rng):
    chain, draft, layer = parts
    session = Session(chain.spec, chain.engines, 2, MAX_LENGTH, drafts=layer)
    first, second = (rng.integers(VOCAB_SIZE, size=size).tolist() for size in (12, 7))
    session.advance([first, second])
    for accepted in (0, 2, 3):
        new = rng.integers(VOCAB_SIZE, size=(4, 2)).tolist()
        before = [session.tokens(0), session.tokens(1)]
        for step, both in enumerate(new[:3]):
            poison(session)
            logits = session.propose_logits([[both[0]], [both[1]] if step < 2 else []])
            for row in range(2 if step < 2 else 1):
                drafts = [each[row] for each in new[1 : step + 1]]
                check(chain, draft, logits[row], [*before[row], new[0][row]], drafts)
        session.complete([[new[3][0]], []], [4, 2])
        for row in range(2):
            session.rewind(min(len(before[row]) + 1 + accepted, session.lengths[row]), row)
    assert (session.watermarks == session.lengths).all()


def test_tokens_that_left_early_are_known_when_they_have_caught_up(parts, rng):
    chain, draft, layer = parts
    session = Session(chain.spec, chain.engines, 1, MAX_LENGTH, drafts=layer)
    tokens = rng.integers(VOCAB_SIZE, size=14).tolist()
    session.advance(tokens[:5], 1)
    assert not session.can_propose()
    session.advance(tokens[5:9], 3)
    session.advance(tokens[9:11], 2)
    with pytest.raises(UsageError, match="can't draft after 1 tokens"):
        session.propose([tokens[11:12]])
    assert session.tokens() == tokens[:11]
    session.advance(tokens[11:12])
    assert session.can_propose()
    check(chain, draft, session.propose_logits([tokens[12:13]])[0], tokens[:13], [])
    session.rewind(6)
    session.advance(tokens[6:11])
    check(chain, draft, session.propose_logits([tokens[11:12]])[0], tokens[:12], [])


def test_the_likeliest_token_is_one_that_the_layer_drafts(parts, rng):
    chain, draft, layer = parts
    session = Session(chain.spec, chain.engines, 3, MAX_LENGTH, drafts=layer)
    session.advance(rng.integers(VOCAB_SIZE, size=(3, 6)).tolist())
    tokens = session.propose([[3], [], [5]])
    assert tokens[1] == -1
    if draft.tokens is not None:
        assert {tokens[0], tokens[2]} <= set(draft.tokens.tolist())


def test_without_a_draft_layer_nothing_is_proposed(parts):
    chain, _, _ = parts
    session = Session(chain.spec, chain.engines, 1, MAX_LENGTH)
    session.advance([1, 2, 3])
    assert not session.can_propose()
    with pytest.raises(UsageError, match="can't draft"):
        session.propose([[1]])
