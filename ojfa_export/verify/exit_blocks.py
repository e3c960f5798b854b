"""The blocks of a block jump against float64, and against their definition."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.onnxruntime.portable import PortableGraphs
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.block_shortcut import BlockShortcut, BlocksOnSequences
from ojfa_export.bundle.names import exit_block_name
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.models.head import FinalNorm
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session
from ojfa_export.verify.check import Check
from ojfa_export.verify.exact import HIDDEN, ExactModel, Tensors
from ojfa_export.verify.tolerances import Arithmetic, Comparisons, exit_allowance


def graph_of(shortcut: BlockShortcut, exit: int) -> tuple[str, int]:
    """The name of the graph of an exit's block, and the exit's number among the shortcut's."""
    index = shortcut.exits.index(exit)
    return exit_block_name(index if shortcut.blocks > 1 else 0), index


def compare_exit_block(
    jump: BlocksOnSequences,
    engines: Engines,
    exact: ExactModel,
    arithmetic: Arithmetic,
    token_ids: Int32,
    hidden: Float32,
    exit: int,
) -> tuple[list[Check], str, Tensors]:
    """Compares an exit's block with float64 on the bundle's weights: alone, and in a session.

    The float64 result is compared with what the bundle's shortcut file says as well.

    Args:
        jump: On sequences of S tokens.
        engines: Opened, with exits' blocks.
        exact: The reference.
        arithmetic: Of matrix products.
        token_ids: [B,S].
        hidden: [B,S,H] after the exit's blocks, by the reference.
        exit: One that the jump serves.

    Returns:
        The checks, the graph's name, and the reference's tensors.
    """
    spec, comparisons = jump.spec, Comparisons(arithmetic)
    name, index = graph_of(jump.shortcut, exit)
    wide = hidden.astype(np.float64)
    tensors = exact.exit_block(name, index, wide)
    expected, flat = tensors[HIDDEN], wide.reshape(-1, spec.hidden_size)
    label = f"{name} at exit {exit}"
    given = jump.apply(flat, exit).reshape(expected.shape)
    comparisons.record(f"shortcut file {label}: {HIDDEN}", "hidden", given, expected)
    for actual in exit_block_in_pieces(engines, exit, hidden):
        comparisons.record(f"float64 {label}: {HIDDEN}", "hidden", actual, expected)
    target = exact.logits(expected.reshape(flat.shape), spec.blocks)
    norm = FinalNorm(spec.norm, np.ones(spec.hidden_size), None, spec.norm_epsilon)
    allowance = exit_allowance(jump, norm, flat, target, arithmetic, exit)
    logits = _in_a_session(spec, engines, token_ids, exit)
    comparisons.record(f"float64 exit {exit}: logits", "logits", logits, target, allowance)
    return comparisons.checks(), label, tensors


def exit_block_in_pieces(engines: Engines, exit: int, hidden: Float32) -> list[Float32]:
    """An exit's block on [B,S,H] from position 0 on, in one piece; and in three, as a session."""
    assert engines.exit_blocks is not None
    batch, length, size = hidden.shape
    results = []
    for bounds in ((0, length), (0, length // 2, length - 1, length)):
        executor = engines.exit_blocks.executor(batch, length)
        result = np.empty_like(hidden)
        for start, stop in pairwise(bounds):
            piece = executor.run(
                exit,
                np.ascontiguousarray(hidden[:, start:stop]).reshape(-1, size),
                [Chunk(slot, start, stop - start) for slot in range(batch)],
                long_context=False,
            )
            result[:, start:stop] = np.asarray(piece).reshape(batch, stop - start, -1)
        results.append(result)
    return results


def graph_outputs(
    graphs: PortableGraphs, shortcut: BlockShortcut, exit: int, token_ids: Int32, hidden: Float32
) -> Float32:
    """What the portable graph of an exit's block gives [B S,H], on [B,S,H] from position 0 on."""
    batch, length, size = hidden.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)).copy()
    _, rotations = graphs.embed(token_ids[:, :length], positions, long_context=False)
    _, index = graph_of(shortcut, exit)
    block = index if shortcut.blocks > 1 else 0
    outputs, _ = graphs.exit_block(block, index, hidden, positions, rotations)
    return np.ascontiguousarray(outputs).reshape(-1, size)


def _in_a_session(spec: ModelSpec, engines: Engines, token_ids: Int32, exit: int) -> Float32:
    """Logits [B S,V] of every position: all tokens have run when half of them first ask."""
    batch, length = token_ids.shape
    session, half = Session(spec, engines, batch, length), length // 2
    session.advance(token_ids[:, :half].tolist(), "full")
    later = session.advance(token_ids[:, half:].tolist(), exit, every_position=True)
    other = Session(spec, engines, batch, length)
    first = other.advance(token_ids[:, :half].tolist(), exit, every_position=True)
    return np.concatenate([each for pair in zip(first, later, strict=True) for each in pair])
