"""Shadow checks: what they find, that they change nothing after them, and what is told of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_policy import decide
from test_session import (
    BATCH,
    MAX_LENGTH,
    NAMES,
    advance,
    check_watermarks,
    examples,
    fitting,
    fresh_logits,
    rewind,
)
from tiny_models import VOCAB_SIZE
from tolerances import LOGITS_FP32, NEAR_TIE

from ojfa_export.decoding.events import DraftChecked, ExitTaken, ShadowCheck
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import UsageError
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.shadow import PendingCheck, Shadow
from ojfa_export.runtime.speculator import Speculator

HALF = ExitPolicy(exits=(2,), measure="top", thresholds=(0.02,))


def watched(chain: Any, share: float = 1.0, batch: int = 1, seed: int = 0) -> Session:
    shadow = Shadow(share, np.random.default_rng(seed))
    return Session(chain.spec, chain.engines, batch, MAX_LENGTH, shadow)


def steps(session: Session, first: Any, second: Any) -> np.ndarray:
    """One step of a program of `advance` or `decide`."""
    new = fitting(session, first)
    if isinstance(second, int):
        return session.advance(new, min(second, session.spec.blocks))
    exits = sorted(exit for exit in second if exit < session.spec.blocks)
    policy = ExitPolicy(exits=exits, measure="top", thresholds=[second[exit] for exit in exits])
    return session.decide(new, policy).logits


@pytest.mark.parametrize("name", NAMES)
@examples
@given(
    program=st.lists(advance | decide | rewind | st.integers(0, 3), min_size=1, max_size=10),
    share=st.sampled_from([0.3, 1.0]),
)
def test_checks_change_nothing_and_find_what_the_full_model_says(name, chain_of, program, share):
    """Against a session without checks, and against fresh ones that run all tokens at once."""
    chain = chain_of(name)
    session, plain = watched(chain, share, BATCH), chain.session(BATCH, MAX_LENGTH)
    told: list[ShadowCheck] = []
    session.on_event = lambda event: told.append(event) if isinstance(event, ShadowCheck) else None
    for step in [*program, ([[1]] * BATCH, 2), 9, ([[1]] * BATCH, chain.spec.blocks)]:
        told.clear()
        before = [session.tokens(row) for row in range(BATCH)]
        if isinstance(step, int):
            checks = session.run_shadow_checks(step)
            assert len(checks) <= step
            assert told == checks
        elif isinstance(step[0], int):
            length = round(step[1] * session.lengths[step[0]])
            session.rewind(length, step[0])
            plain.rewind(length, step[0])
        else:
            found, expected = steps(session, *step), steps(plain, *step)
            # A near tie at a threshold may send a token another way; its depth then shows.
            if session.stats.exits == plain.stats.exits:
                np.testing.assert_allclose(found, expected, atol=LOGITS_FP32, rtol=0)
        for check in told:
            ids = before[check.row][: check.position + 1]
            if len(ids) > check.position:  # else it is the step's own token, of full depth
                confirm(chain, ids, check)
        check_watermarks(session)
        assert [session.tokens(row) for row in range(BATCH)] == [
            plain.tokens(row) for row in range(BATCH)
        ]


def confirm(chain: Any, ids: list[int], check: ShadowCheck) -> None:
    early, full = (fresh_logits(chain, ids, depth) for depth in (check.blocks_run, "full"))
    for logits in (early, full):
        second, first = np.sort(logits)[-2:]
        if first - second < NEAR_TIE:
            return
    assert check.agrees == (early.argmax() == full.argmax())


def test_generated_tokens_are_those_without_checks(chain_of, rng):
    """Greedy, for 24 tokens, with every early token completed as soon as it is there."""
    chain = chain_of("llama-gqa")
    prompt = rng.integers(VOCAB_SIZE, size=5).tolist()
    generated = []
    for session in (watched(chain), chain.session(1, MAX_LENGTH)):
        ids, tokens = prompt, []
        for _ in range(24):
            ids = [int(session.decide(ids, HALF).logits[0].argmax())]
            tokens += ids
            if session.shadow is not None:
                session.run_shadow_checks()
        generated.append(tokens)
    assert generated[0] == generated[1]


def test_what_caught_up_by_itself_is_only_compared(chain_of, monkeypatch):
    """A deeper token completes the ones before it; their checks then run no block."""
    chain = chain_of("llama-gqa")
    session = watched(chain)
    session.advance([1, 2, 3], 2)
    session.advance([4], "full")
    monkeypatch.setattr(session._runner.executor, "run", None)
    [check] = session.run_shadow_checks()
    assert (check.position, check.blocks_run) == (2, 2)
    confirm(chain, [1, 2, 3], check)


def test_each_token_counts_alike_whatever_was_chosen():
    """Over all choices of one size the mean loss is the sequence's true share, exactly."""
    differs = [True, False, False, True, False, True]
    early = [True, True, False, True, False, True]
    losses: dict[int, list[float]] = {}
    for chosen in product([True, False], repeat=len(differs)):
        shadow = Shadow(0.5, np.random.default_rng(0))
        shadow._generator = iter_generator(chosen)
        for position, stops in enumerate(early):
            if not shadow.choose():
                continue
            if stops:
                shadow.add(PendingCheck(0, position, 2, 7))
            else:
                shadow.record(ShadowCheck(0, position, 4, True))
        for due in shadow.due:
            shadow.record(ShadowCheck(0, due.position, 2, not differs[due.position]))
        loss = shadow.loss(0)
        if loss is None:
            assert not any(chosen)
        else:
            losses.setdefault(sum(chosen), []).append(loss)
    assert len(losses) == len(differs)
    for values in losses.values():
        assert np.mean(values) == pytest.approx(0.5)


def iter_generator(chosen: tuple[bool, ...]) -> Any:
    class Scripted:
        values = iter(0.1 if each else 0.9 for each in chosen)

        def random(self) -> float:
            return next(self.values)

    return Scripted()


def test_the_share_that_is_chosen(rng):
    shadow = Shadow(0.3, rng)
    count = sum(shadow.choose() for _ in range(20_000))
    assert abs(count - 6000) < 5 * (20_000 * 0.3 * 0.7) ** 0.5  # five standard errors


def test_what_is_told_and_counted(chain_of, rng):
    chain = chain_of("llama-gqa")
    session = watched(chain, batch=4)
    events: list[Any] = []
    session.on_event = events.append
    ids = rng.integers(VOCAB_SIZE, size=(4, 3)).tolist()
    step = session.decide(ids, ExitPolicy(exits=(1, 3), measure="top", thresholds=(2.0, 0.0)))
    exits = [event for event in events if isinstance(event, ExitTaken)]
    assert [(e.row, e.position, e.blocks_run) for e in exits] == [(row, 2, 3) for row in range(4)]
    np.testing.assert_array_equal([e.confidence for e in exits], step.confidence.T)
    assert session.stats.mean_confidence == {3: pytest.approx(step.confidence[1].mean())}
    assert len(session.run_shadow_checks(3)) == 3
    assert len(session.run_shadow_checks()) == 1
    assert session.run_shadow_checks() == []
    checks = [event for event in events if isinstance(event, ShadowCheck)]
    assert [check.row for check in checks] == [0, 1, 2, 3]
    assert session.stats.shadow_checks == 4
    assert session.stats.shadow_disagreements == sum(not check.agrees for check in checks)
    session.advance([[5]] * 4, "full")
    assert session.stats.shadow_checks == 4  # tokens of full depth agree without a check
    losses = [session.shadow.loss(row) for row in range(4)]
    assert losses == [0.0 if check.agrees else 0.5 for check in checks]


def test_drafts_are_told(chain_of):
    session = chain_of("llama-gqa").session(1, MAX_LENGTH)
    events: list[Any] = []
    session.on_event = events.append
    speculator = Speculator(session, Speculation(2, 3), Sampling(), [np.random.default_rng(0)])
    speculator.step([[1, 2, 3]], [9])
    [told] = [event for event in events if isinstance(event, DraftChecked)]
    assert (told.drafted, told.accepted) == (3, session.stats.accepted)


def test_a_loss_needs_its_checks(chain_of):
    session = watched(chain_of("llama-gqa"))
    assert session.shadow.loss(0) is None
    session.advance([1, 2], 1)
    with pytest.raises(UsageError, match="1 tokens of sequence 0 wait for their shadow checks"):
        session.shadow.loss(0)
    session.rewind(1)
    assert session.shadow.loss(0) is None
    assert session.run_shadow_checks() == []


def test_sessions_without_shadow_checks(chain_of):
    with pytest.raises(UsageError, match="this session chooses no tokens"):
        chain_of("gpt2").session().run_shadow_checks()
    with pytest.raises(UsageError, match="budget of shadow checks must be 0 or more"):
        watched(chain_of("gpt2")).run_shadow_checks(-1)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        Shadow(share, np.random.default_rng(0))


def test_longropes_switch_comes_after_the_checks(chain_of, rng):
    """Beyond it the past is rotated otherwise: what was said before is compared before."""
    chain = chain_of("phi3-longrope")
    switch = chain.spec.rotary_switch
    ids = rng.integers(VOCAB_SIZE, size=switch).tolist()
    session = watched(chain)
    told: list[Any] = []
    session.on_event = told.append
    session.advance(ids, 1)
    session.advance([5], 1)
    [check] = [event for event in told if isinstance(event, ShadowCheck)]
    assert check.position == switch - 1
    confirm(chain, ids, check)
    session.rewind(switch)  # back to the short factors: the long ones' token is forgotten
    assert session.run_shadow_checks() == []


def test_crossing_the_switch_leaves_other_rows_as_they_wait(chain_of, rng):
    """A row that crosses it is checked first; what is asked of another still waits."""
    chain = chain_of("phi3-longrope")
    switch = chain.spec.rotary_switch
    first, second = (rng.integers(VOCAB_SIZE, size=n).tolist() for n in (5, switch))
    sessions = watched(chain, batch=2), chain.session(2)
    results = []
    for session in sessions:
        session.advance([first, second], 1)
        # The newest token of the first row waits; the second row goes beyond the switch.
        results.append(session.complete([[], [7, 8]], [1, 1]))
    for checked, plain in zip(*results, strict=True):
        np.testing.assert_allclose(checked, plain, atol=LOGITS_FP32, rtol=0)
    [check] = sessions[0].run_shadow_checks()  # of the first row, whose turn it is now
    assert (check.row, check.position) == (0, 4)
