"""Do the engines compute what the bundle's own weights say? Block by block, against float64.

The reference is `verify.exact`: NumPy on the weight files. Every part runs on the reference's own
input, so that the first check that fails names the block and the tensor that depart. In fp16 the
reference also says which tensors fp16 can't hold, whatever the engines made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Backend, Engines, Tracing
from ojfa_export.backends.checks import checking
from ojfa_export.backends.frugal import frugal
from ojfa_export.backends.narrow_cache import has_fp8_cache
from ojfa_export.bundle.block_shortcut import BlockShortcut, BlocksOnSequences
from ojfa_export.bundle.names import block_name
from ojfa_export.bundle.shortcut_file import ExitShortcut
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.models.head import FinalNorm
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import Progress
from ojfa_export.verify.check import Check
from ojfa_export.verify.exact import HIDDEN, ExactModel, Float64
from ojfa_export.verify.exit_blocks import compare_exit_block
from ojfa_export.verify.pieces import embed_batch, engine_in_pieces
from ojfa_export.verify.tolerances import (
    FP16_LARGEST,
    OF_FP16,
    RANGE,
    Arithmetic,
    Comparisons,
    exit_allowance,
)

# Tokens of each sequence that are fed one by one, and rows that each head is compared on.
DECODED, HEAD_ROWS = 4, 8
SHORTEST = 2 * DECODED

Trace = Callable[[int, Float32], Mapping[str, Float32]]


@dataclass(frozen=True)
class Subject:
    """What is compared with float64.

    Attributes:
        spec: The model.
        arithmetic: Of matrix products.
        graphs: Directory of the portable graphs and the weights.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        shortcut: What the exit head was made of.
        engines: Opened; large ones should keep one block loaded at a time.
        trace: Gives tensors inside a block on one sequence [S,H], where the backend can.
        check_tokens: Ids [n] that the logits of a check head are of, where there is one.
    """

    spec: ModelSpec
    arithmetic: Arithmetic
    graphs: Path
    rotary: tuple[Float32, Float32] | None
    shortcut: ExitShortcut
    engines: Engines
    trace: Trace | None = None
    check_tokens: Int32 | None = None


def make_subject(
    spec: ModelSpec,
    arithmetic: Arithmetic,
    graphs: Path,
    rotary: tuple[Float32, Float32] | None,
    shortcut: ExitShortcut,
    engines: Engines,
    backend: Backend,
    check_tokens: Int32 | None = None,
) -> Subject:
    """What is compared, of engines that a backend opened: one block at a time if it is large."""
    trace: Trace | None = None
    if isinstance(backend, Tracing):
        tracing = backend

        def trace(block: int, hidden: Float32) -> Mapping[str, Float32]:
            return tracing.trace_block(engines, block, hidden)

    return Subject(
        spec, arithmetic, graphs, rotary, shortcut, frugal(engines, spec), trace, check_tokens
    )


def verify_blocks(subject: Subject, token_ids: Int32, progress: Progress) -> list[Check]:
    """Compares every engine, and the chain at full depth, with float64.

    Args:
        subject: What to compare.
        token_ids: [B,S] within what the engines' cache holds; LongRoPE is compared within its
            short length.
        progress: Shows blocks.

    Returns:
        The checks in the order of the computation, passed or not; none for fewer than 8 tokens.
    """
    spec = subject.spec
    ids = np.ascontiguousarray(token_ids[:, : spec.rotary_switch])
    if ids.shape[1] < SHORTEST:
        return []
    fp8_cache = has_fp8_cache(subject.engines)
    exact = ExactModel(spec, subject.graphs, subject.rotary, fp8_cache=fp8_cache)
    exits = _compared_exits(subject)
    checks: list[Check] = []
    with progress.task("comparing with float64", spec.blocks + 2, "blocks") as task:
        hidden = exact.embed(ids).astype(np.float32)
        checks += _compare_embed(subject, ids, hidden)
        task.advance()
        for index in range(spec.blocks):
            found, hidden = _compare_block(subject, exact, index, hidden)
            checks += found
            if index + 1 in exits:
                checks += _compare_exit(subject, exact, ids, hidden, index + 1)
            task.advance()
        checks += _compare_chain(subject, exact, ids, hidden)
        task.advance()
    return checks


def _compare_embed(subject: Subject, ids: Int32, expected: Float32) -> list[Check]:
    comparisons = Comparisons(subject.arithmetic)
    embedded = embed_batch(subject.engines, ids)
    comparisons.record(f"float64 embed: {HIDDEN}", "hidden", embedded, expected)
    return comparisons.checks()


def _compare_block(
    subject: Subject, exact: ExactModel, index: int, hidden: Float32
) -> tuple[list[Check], Float32]:
    """A block's checks, and its output [B,S,H] by the reference."""
    name, comparisons = block_name(index), Comparisons(subject.arithmetic)
    expected = exact.block(index, hidden.astype(np.float64))
    checks = _check_range(name, expected) if subject.arithmetic in OF_FP16 else []
    if subject.trace is not None:
        for row, states in enumerate(hidden):
            for tensor, actual in subject.trace(index, states).items():
                label = f"float64 {name}: {tensor}"
                comparisons.record(label, "hidden", actual, expected[tensor][row])
    for actual in engine_in_pieces(subject.engines, index, hidden, long_context=False):
        comparisons.record(f"float64 {name}: {HIDDEN}", "hidden", actual, expected[HIDDEN])
    return checks + comparisons.checks(), expected[HIDDEN].astype(np.float32)


def _check_range(name: str, tensors: Mapping[str, Float64]) -> list[Check]:
    """Whether fp16 holds what goes into and comes out of matrix products."""
    largest = largest_tensor(tensors)
    return [
        Check(
            name=f"{RANGE}{name}: {largest.tensor}",
            max_abs_diff=largest.value,
            tolerance=FP16_LARGEST,
            passed=largest.value <= FP16_LARGEST,
        )
    ]


@dataclass(frozen=True)
class Largest:
    """The tensor of a block that holds the largest absolute value; the first beyond fp16, if any.

    Attributes:
        tensor: Its name, as in `ExactModel.block`.
        value: The value.
    """

    tensor: str
    value: float


def largest_tensor(tensors: Mapping[str, Float64]) -> Largest:
    """Finds it among the tensors that an fp16 engine holds in fp16: all but the hidden states."""
    found = [
        Largest(name, float(np.abs(values).max()))
        for name, values in tensors.items()
        if name != HIDDEN
    ]
    beyond = (each for each in found if each.value > FP16_LARGEST)
    return next(beyond, max(found, key=lambda each: each.value))


def _compared_exits(subject: Subject) -> set[int]:
    """The first exit, one in the middle, the last one, and full depth."""
    blocks, shortcut = subject.spec.blocks, subject.shortcut
    if isinstance(shortcut, BlockShortcut):
        served = shortcut.exits
        return {served[0], served[len(served) // 2], served[-1], blocks}
    return {1, max(1, blocks // 2), blocks - 1, blocks}


def _compare_exit(
    subject: Subject, exact: ExactModel, ids: Int32, hidden: Float32, blocks_run: int
) -> list[Check]:
    """What follows after some blocks: a head, or a block behind an exit."""
    spec, shortcut, arithmetic = subject.spec, subject.shortcut, subject.arithmetic
    if blocks_run == spec.blocks or not isinstance(shortcut, BlockShortcut):
        return _compare_head(subject, exact, hidden, blocks_run)
    jump = BlocksOnSequences(shortcut, spec, subject.rotary, ids.shape[1])
    checks, label, tensors = compare_exit_block(
        jump, subject.engines, exact, arithmetic, ids, hidden, blocks_run
    )
    checks += _compare_check_head(subject, exact, tensors[HIDDEN], exit=blocks_run)
    return (_check_range(label, tensors) if arithmetic in OF_FP16 else []) + checks


def _compare_check_head(
    subject: Subject, exact: ExactModel, outputs: Float64, *, exit: int
) -> list[Check]:
    """The check head, where there is one, on what an exit's block gives [B,S,H]."""
    spec, comparisons = subject.spec, Comparisons(subject.arithmetic)
    tokens, checks_exits = subject.check_tokens, checking(subject.engines)
    if tokens is None or checks_exits is None:
        return []
    rows = outputs.reshape(-1, spec.hidden_size)[-HEAD_ROWS:].astype(np.float32)
    expected = exact.logits(rows.astype(np.float64), spec.blocks)[:, tokens]
    actual = checks_exits.check_logits(rows, exit)
    label = f"float64 check_head behind exit {exit}: logits"
    comparisons.record(label, "logits", actual, expected)
    return comparisons.checks()


def _compare_head(
    subject: Subject, exact: ExactModel, hidden: Float32, blocks_run: int
) -> list[Check]:
    spec, comparisons = subject.spec, Comparisons(subject.arithmetic)
    rows = np.ascontiguousarray(hidden.reshape(-1, spec.hidden_size)[-HEAD_ROWS:])
    inputs = rows.astype(np.float64)
    expected, allowance = exact.logits(inputs, blocks_run), None
    if blocks_run < spec.blocks:
        assert not isinstance(subject.shortcut, BlockShortcut)
        norm = FinalNorm(spec.norm, np.ones(spec.hidden_size), None, spec.norm_epsilon)
        allowance = exit_allowance(
            subject.shortcut, norm, inputs, expected, subject.arithmetic, blocks_run
        )
    actual = subject.engines.logits(rows, blocks_run)
    name = "final_head" if blocks_run == spec.blocks else f"exit_head after {blocks_run}"
    comparisons.record(f"float64 {name}: logits", "logits", actual, expected, allowance)
    tokens, checks_exits = subject.check_tokens, checking(subject.engines)
    if tokens is not None and checks_exits is not None and blocks_run < spec.blocks:
        actual = checks_exits.check_logits(rows, blocks_run)
        label = f"float64 check_head after {blocks_run}: logits"
        comparisons.record(label, "logits", actual, expected[:, tokens], allowance)
    jump = exact.mlp_jump(inputs, blocks_run) if blocks_run < spec.blocks else {}
    checks = _check_range(name, jump) if jump and subject.arithmetic in OF_FP16 else []
    return checks + comparisons.checks()


def _compare_chain(subject: Subject, exact: ExactModel, ids: Int32, hidden: Float32) -> list[Check]:
    """Full depth: a prompt at once, then tokens one by one."""
    spec, comparisons = subject.spec, Comparisons(subject.arithmetic)
    batch, length = ids.shape
    subject.engines.unload_heads()  # the exit head is not asked again
    session = Session(spec, subject.engines, batch, length)
    first = length - DECODED
    actual = [session.advance(ids[:, :first].tolist())]
    actual += [session.advance(ids[:, at : at + 1].tolist()) for at in range(first, length)]
    last = np.ascontiguousarray(hidden[:, first - 1 :]).astype(np.float64)
    expected = exact.logits(last.reshape(-1, spec.hidden_size), spec.blocks)
    comparisons.record(
        "float64 full depth: logits",
        "logits",
        np.stack(actual, axis=1),
        expected.reshape(batch, DECODED + 1, -1),
    )
    return comparisons.checks()
