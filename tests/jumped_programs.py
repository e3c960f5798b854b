"""Random operations of sessions with a block jump, compared with its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from chain import Chain, build_chain, random_blocks
from elements import split_precision
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny_models import POSITIONS, VOCAB_SIZE, make_checkpoint
from tolerances import (
    LOGITS_BF16_RELATIVE,
    LOGITS_FP16_RELATIVE,
    LOGITS_FP32,
    LOGITS_INT8_RELATIVE,
)

from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.rotations import rows_of_sets
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.decoding.policy import ExitPolicy
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
    "gemma2": ((1, 3), True),  # the first block has a window, the last none
    "qwen3": ((1, 2), True),
    "olmo2": ((3,), False),
    "gpt_neox": ((1, 3), True),
}
RELATIVE = {"fp16": LOGITS_FP16_RELATIVE, "bf16": LOGITS_BF16_RELATIVE}
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
programs = st.lists(operations, min_size=1, max_size=8)


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
        close, relative = LOGITS_FP32, RELATIVE.get(self.chain.precision)
        if self.chain.weights is not None:
            relative = LOGITS_INT8_RELATIVE
        if relative is not None:
            close = relative * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=close, rtol=0)


def make_jumped(name: str, directory: Path, seed: int = 0) -> Jumped:
    """The exported variant with random blocks behind exits.

    Args:
        name: Of `JUMPS`, with a precision after a hyphen, or with " int4" for quantised weights.
        directory: To write in.
        seed: Of the blocks.
    """
    variant, _, weights = name.partition(" ")
    variant, precision = split_precision(variant)
    checkpoint = make_checkpoint(variant, directory / "checkpoint", seed=7)
    plain = build_chain(checkpoint, directory / "plain")  # for the model's sizes
    exits, each = JUMPS[variant]
    shortcut = random_blocks(plain.spec, exits, seed=seed, each=each)
    shortcut.check_fits(plain.spec)
    chain = build_chain(
        checkpoint,
        directory / "jumped",
        precision=precision,
        max_length=POSITIONS,
        shortcut=shortcut,
        weights=INT4 if weights else None,
    )
    return Jumped(chain)


def check_marks(session: Session) -> None:
    for sequence in session._sequences:
        for exit, mark in sequence.exits.items():
            assert 0 <= mark <= sequence.marks[exit - 1]


def fitting(session: Session, tokens: list[list[int]]) -> list[list[int]]:
    """As much of each as there is room for."""
    room = [session.max_length - length for length in session.lengths]
    return [ids[:count] for ids, count in zip(tokens, room, strict=True)]


def run_program(
    jump: Jumped, session: Session, program: list, poison: Callable[[Session], None]
) -> None:
    """Runs operations, and two more, of which each must give what the definition says.

    Args:
        jump: What is defined.
        session: Of any backend.
        program: Of `programs`.
        poison: Puts NaN wherever nothing that counts may lie: a step that reads it shows.
    """
    depths, blocks = jump.depths, jump.chain.spec.blocks
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
