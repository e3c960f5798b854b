"""A block behind an exit sees an exit's states of all tokens before, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from jumped_programs import (
    BATCH,
    JUMPS,
    MAX_LENGTH,
    Jumped,
    check_marks,
    examples,
    make_jumped,
    programs,
    run_program,
)
from tiny_models import VOCAB_SIZE

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import UsageError
from ojfa_export.runtime.session import Session


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Jumped]:
    """By the name of a variant, built when first asked for."""
    made: dict[str, Jumped] = {}

    def make(name: str) -> Jumped:
        if name not in made:
            directory = tmp_path_factory.mktemp(name.replace(" ", "-"))
            made[name] = make_jumped(name, directory, seed=len(made))
        return made[name]

    return make


def poison(session: Session) -> None:
    """Puts NaN wherever nothing that counts may lie: a step that reads it shows."""
    runner, marks = session._runner, session.watermarks
    caches = runner.exits.executor._executor
    for index in caches._cache:
        exit = session.exits[index]
        for array in caches.cache(index):
            for sequence in session._sequences:
                array[sequence.slot, :, sequence.exits.get(exit, 0) :] = np.nan
    for depth, waiting in runner.pending.items():
        for sequence in session._sequences:
            known = min(marks[depth, sequence.slot], sequence.exits.get(depth, MAX_LENGTH))
            waiting[sequence.slot, :known] = np.nan
            waiting[sequence.slot, marks[depth - 1, sequence.slot] :] = np.nan


@pytest.mark.parametrize("name", [*JUMPS, "llama-gqa int4"])
@examples
@given(program=programs)
def test_whatever_came_before_it_is_the_definition(
    name: str, jumped: Callable[[str], Jumped], program: list
) -> None:
    jump = jumped(name)
    run_program(jump, jump.chain.session(BATCH, MAX_LENGTH), program, poison)


def test_exits_that_are_not_asked_take_no_memory(jumped: Callable[[str], Jumped], rng) -> None:
    jump = jumped("mistral-sliding-window")
    session = jump.chain.session(2, MAX_LENGTH)
    prompts = rng.integers(VOCAB_SIZE, size=(2, 9)).tolist()
    session.advance([prompts[0], []], "full")
    caches = session._runner.exits.executor._executor._cache
    assert not caches
    assert not session._runner.pending
    session.advance([[], prompts[1]], 2)
    assert list(caches) == [1]
    for new in ([[5], [7]], [[6], [8]]):  # the second pass is cut for the states alone
        session.advance(new, "full")
    assert list(session._runner.pending) == [2]
    states = session._runner.pending[2]
    assert states[1, :11].any(axis=-1).all()
    assert not states[0, 10].any(), "only the sequence that asks keeps states"
    session.rewind(0, 1)
    assert not session._sequences[1].exits, "one that begins anew uses none"


def test_an_interrupted_step_can_be_run_again(jumped: Callable[[str], Jumped], rng) -> None:
    jump = jumped("llama-gqa")
    session = jump.chain.session(1, MAX_LENGTH)
    ids = rng.integers(VOCAB_SIZE, size=12).tolist()
    session.advance(ids, "full")
    runner = session._runner
    for interrupted in (runner.executor, runner.exits.executor):
        run = interrupted.run

        def fails(*arguments, **named):
            raise KeyboardInterrupt

        interrupted.run = fails
        with pytest.raises(KeyboardInterrupt):
            session.advance([3], 3)
        interrupted.run = run
        check_marks(session)
        [logits] = session.advance([4], 3)
        jump.check(logits[None], session.tokens(), 3)


def test_another_exit_is_refused(jumped: Callable[[str], Jumped]) -> None:
    jump = jumped("llama-gqa")
    session = jump.chain.session(1, MAX_LENGTH)
    policy = ExitPolicy(exits=(1, 2), measure="top", thresholds=(0.5, 0.5))
    for asks in (
        lambda: session.advance([1], 2),
        lambda: session.deepen(2),
        lambda: session.choose([1], 2),
        lambda: session.choose([1], policy),
        lambda: session.decide([1], policy),
    ):
        with pytest.raises(UsageError, match="exit 2 is none of this bundle's") as caught:
            asks()
        assert "serves 1, 3" in str(caught.value)
    assert session.lengths == [0]
