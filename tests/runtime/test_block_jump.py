"""A block behind an exit sees an exit's states of all tokens before, whatever happened before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from chain import Chain, build_chain, random_blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_session import fitting
from tiny_models import POSITIONS, VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_FP32, LOGITS_INT8_RELATIVE

from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.rotations import rows_of_sets
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import SECOND
from ojfa_export.runtime.session import Session
from ojfa_export.verify.checks import language_head

BATCH = 3
MAX_LENGTH = 40  # beyond LongRoPE's switch length (32) and the sliding window (8)
# By variant: the exits, and whether each has a block of its own.
JUMPS = {
    "llama-gqa": ((1, 3), False),
    "gpt2": ((2,), True),
    "mistral-sliding-window": ((1, 2, 3), True),
    "phi3-longrope": ((1, 3), True),
    "gemma3_text": ((2, 3), False),
    "qwen3": ((1, 2), True),
    "olmo2": ((3,), False),
    "gpt_neox": ((1, 3), True),
}
INT4 = WeightFormat(storage="int4", group_size=32, zero_points=True)

examples = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
token = st.integers(0, VOCAB_SIZE - 1)
tokens_of_each = st.lists(
    st.lists(token, max_size=4) | st.lists(token, min_size=8, max_size=20),
    min_size=BATCH,
    max_size=BATCH,
)
depth = st.integers(0, 3)  # among the exits and full depth
thresholds = st.lists(st.sampled_from([-1.0, 2.0]), min_size=3, max_size=3)
operations = st.one_of(
    st.tuples(st.just("advance"), tokens_of_each, depth),
    st.tuples(st.just("every position"), tokens_of_each, depth),
    st.tuples(st.just("decide"), tokens_of_each, thresholds),
    st.tuples(st.just("deepen"), st.just(0), depth),
    st.tuples(st.just("rewind"), st.integers(0, BATCH - 1), st.floats(0, 1)),
)


@dataclass(frozen=True)
class Jumped:
    """A chain with a block jump, and what it says by the definition."""

    chain: Chain

    @property
    def depths(self) -> tuple[int, ...]:
        return (*self.chain.shortcut.exits, self.chain.spec.blocks)

    def states(self, tokens: list[int], depth: int, *, long: bool) -> np.ndarray:
        """Hidden states [T, H] after some blocks, of a cache of its own."""
        executor, chunks = self.chain.engines.executor(1, len(tokens)), [Chunk(0, 0, len(tokens))]
        hidden = executor.embed(tokens, chunks)
        return executor.run(range(depth), hidden, chunks, long_context=long).copy()

    def logits(self, tokens: list[int], depth: int) -> np.ndarray:
        """Logits [T, V] of every position, the jump by `BlockShortcut.apply` in float64."""
        spec, checkpoint = self.chain.spec, self.chain.checkpoint
        long = spec.rotary_switch is not None and len(tokens) > spec.rotary_switch
        hidden = self.states(tokens, depth, long=long).astype(np.float64)
        if depth == spec.blocks:
            return self.head(hidden)
        rotary = checkpoint.family.rotary(checkpoint.config)
        rows: tuple[np.ndarray, ...] = ()
        if rotary is not None:
            tables = rotary.tables(self.chain.max_length)
            sets = rows_of_sets(spec, len(tables[0]), long_context=long)
            own = sets[spec.rotations_of(spec.blocks - 1) == SECOND]
            rows = tuple(table[own][: len(tokens)] for table in tables)
        return self.head(self.chain.shortcut.apply(hidden, depth, spec, rows))

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """The model's own; a quantised one as the engines have it."""
        if self.chain.weights is None:
            return language_head(self.chain.checkpoint).logits(hidden)
        return self.chain.engines.logits(hidden.astype(np.float32), self.chain.spec.blocks)

    def check(self, found: np.ndarray, tokens: list[int], depth: int) -> None:
        """Compares the logits of the last positions."""
        expected = self.logits(tokens, depth)[len(tokens) - len(found) :]
        close = LOGITS_FP32
        if self.chain.weights is not None:
            close = LOGITS_INT8_RELATIVE * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=close, rtol=0)


@pytest.fixture(scope="module")
def jumped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Jumped]:
    """The exported variant with random blocks behind exits, built when first asked for."""
    made: dict[str, Jumped] = {}

    def make(name: str) -> Jumped:
        if name not in made:
            variant, _, weights = name.partition(" ")
            directory = tmp_path_factory.mktemp(name.replace(" ", "-"))
            checkpoint = make_checkpoint(variant, directory / "checkpoint", seed=7)
            plain = build_chain(checkpoint, directory / "plain")  # for the model's sizes
            exits, each = JUMPS[variant]
            shortcut = random_blocks(plain.spec, exits, seed=len(made), each=each)
            shortcut.check_fits(plain.spec)
            chain = build_chain(
                checkpoint,
                directory / "jumped",
                max_length=POSITIONS,
                shortcut=shortcut,
                weights=INT4 if weights else None,
            )
            made[name] = Jumped(chain)
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


def check_marks(session: Session) -> None:
    for sequence in session._sequences:
        for exit, mark in sequence.exits.items():
            assert 0 <= mark <= sequence.marks[exit - 1]


@pytest.mark.parametrize("name", [*JUMPS, "llama-gqa int4"])
@examples
@given(program=st.lists(operations, min_size=1, max_size=8))
def test_whatever_came_before_it_is_the_definition(
    name: str, jumped: Callable[[str], Jumped], program: list
) -> None:
    jump = jumped(name)
    depths, blocks = jump.depths, jump.chain.spec.blocks
    session = jump.chain.session(BATCH, MAX_LENGTH)
    last = ("advance", [[1]] * BATCH, 0), ("advance", [[2]] * BATCH, 3)
    for what, first, second in (*program, *last):
        poison(session)
        check_marks(session)
        if what == "rewind":
            session.rewind(round(second * session.lengths[first]), first)
            continue
        if what == "decide":
            exits = jump.chain.shortcut.exits
            policy = ExitPolicy(exits=exits, measure="top", thresholds=second[: len(exits)])
            new = fitting(session, first)
            step = session.decide(new, policy)
            stop = next((e for e, t in zip(exits, second, strict=False) if t < 0), blocks)
            for row in (row for row, ids in enumerate(new) if ids):
                assert step.blocks_run[row] == stop
                jump.check(step.logits[row : row + 1], session.tokens(row), stop)
            continue
        exit = depths[min(second, len(depths) - 1)]
        every = what != "advance"
        if what == "deepen":
            logits = session.deepen(exit, every_position=True)
        else:
            logits = session.advance(fitting(session, first), exit, every_position=every)
        for row, found in enumerate(logits):
            ran = len(found) if every else bool(found.any())
            if ran:
                jump.check(found if every else found[None], session.tokens(row), exit)
    check_marks(session)


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
