"""Is a bundle its model? Every part on the reference's own inputs, then the chain as a whole.

The reference is transformers in fp32. A part that differs is named by its own check, since its
inputs are right whatever the parts before it do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.frugal import FrugalEngines, close_all, frugal
from ojfa_export.backends.onnxruntime.portable import PortableGraphs
from ojfa_export.bundle import shortcut_file
from ojfa_export.bundle.block_shortcut import BlockShortcut, BlocksOnSequences
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import SHORTCUT, block_name
from ojfa_export.bundle.shortcut_file import ExitShortcut, RowShortcut, exits_of
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.errors import UsageError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import Progress, Task
from ojfa_export.verify.as_users import verify_defaults, verify_generation, verify_tokenizer
from ojfa_export.verify.check import Check
from ojfa_export.verify.exit_heads import ExitHeads
from ojfa_export.verify.pieces import embed_batch, engine_in_pieces
from ojfa_export.verify.quantised import verify_weights
from ojfa_export.verify.reference import TransformersReference, reference_of
from ojfa_export.verify.tolerances import (
    Arithmetic,
    Comparisons,
    arithmetic_of_model,
    exit_allowance,
)

# Tokens of each sequence that are fed one by one.
DECODED = 4
# Positions compared at each exit: each is a row of V float64 logits.
EXIT_POSITIONS = 32
SHORTEST = 2 * DECODED


@dataclass(frozen=True)
class Parts:
    """What is compared with the reference.

    Attributes:
        spec: The model.
        precision: Of the portable graphs and the weights; "int8" where products with quantised
            weights round what they multiply.
        graphs: Directory of the portable graphs.
        open_engines: Opens the engines; called anew for each block, so that an opener that keeps
            none open keeps one block in memory.
        shortcut: What the exit head was made of.
        check_tokens: Ids [n] that the logits of a check head are of, where there is one.
    """

    spec: ModelSpec
    precision: Arithmetic
    graphs: Path
    open_engines: Callable[[], Engines]
    shortcut: ExitShortcut
    check_tokens: Int32 | None = None


@dataclass(frozen=True)
class Window:
    """Token ids [B,S], and which of LongRoPE's factors transformers uses for them."""

    token_ids: Int32
    long_context: bool = False

    @property
    def label(self) -> str:
        """Ends the names of this window's checks."""
        return " (long context)" if self.long_context else ""


@dataclass
class Reference:
    """What the reference gave for a window.

    Attributes:
        logits: [B,S,V].
        exits: For blocks run 1..L-1, hidden states [B,n,H] of the first few positions.
    """

    logits: Float32
    exits: dict[int, Float32]


def verify_against(
    bundle: Bundle,
    model: Model,
    checkpoint: Path,
    token_ids: Int32,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> list[Check]:
    """Compares a bundle with the checkpoint that it was built from.

    Weights that the build quantised are compared themselves, each with its own; not what they
    compute. Those that the checkpoint had quantised are compared in both ways.

    Args:
        bundle: The bundle.
        model: The same bundle, opened.
        checkpoint: Directory of the checkpoint.
        token_ids: [B,S] text to compare on; what the bundle's cache or the model's positions
            can't hold is left out.
        progress: Shows blocks and exits.
        trust_remote_code: Whether transformers may run code that lies in the checkpoint.

    Returns:
        The checks, passed or not.

    Raises:
        UsageError: The checkpoint is of another model, or fewer than 8 tokens a sequence.
        CheckpointError: The checkpoint can't be read.
    """
    source = Checkpoint(checkpoint, bundle.manifest.model.ignored_fields)
    if source.spec != model.spec:
        raise UsageError(
            f"{bundle.directory} was built from another model than {checkpoint}",
            hint=f"name the checkpoint of {bundle.manifest.model.name}",
        )
    shortcut, _ = shortcut_file.load_exit(bundle.path(SHORTCUT))
    reference = reference_of(source, trust_remote_code=trust_remote_code)
    manifest = bundle.manifest
    if manifest.weights is not None and source.layout is None:
        # transformers runs the original's weights, which these are not: what that changes is a
        # figure (`verify.quantised.measure_change`), and products are compared with float64.
        return [
            *verify_tokenizer(model, checkpoint),
            *verify_weights(bundle, source, manifest.weights),
            verify_defaults(manifest, source),
        ]
    engines = frugal(model.engines, model.spec)
    arithmetic = arithmetic_of_model(model)
    parts = Parts(
        model.spec,
        arithmetic,
        bundle.graphs,
        lambda: engines,
        shortcut,
        bundle.check_tokens(),
    )
    fitting = token_ids[: manifest.cache.max_batch_size, : manifest.cache.max_length]
    return [
        *verify_tokenizer(model, checkpoint),
        *(verify_weights(bundle, source, manifest.weights) if manifest.weights else ()),
        *verify_parts(parts, reference, source, fitting, progress),
        *verify_generation(model, source, fitting, trust_remote_code=trust_remote_code),
    ]


def verify_parts(
    parts: Parts,
    reference: TransformersReference,
    checkpoint: Checkpoint,
    token_ids: Int32,
    progress: Progress,
) -> list[Check]:
    """Compares graphs, engines, the chain at full depth and every exit with the reference.

    Args:
        parts: What to compare.
        reference: Of the checkpoint.
        checkpoint: Gives the weights of the final norm and the LM head for the exits.
        token_ids: [B,S], within what the engines' cache holds.
        progress: Shows blocks and exits.

    Raises:
        UsageError: Fewer than 8 tokens a sequence.
    """
    comparisons = Comparisons(parts.precision)
    blocks = parts.spec.blocks
    windows = make_windows(checkpoint, token_ids)
    exits = exits_of(parts.shortcut, blocks)
    total = len(windows) * (blocks + 2) + len(exits)
    close_all(parts.open_engines(), parts.spec)  # of comparisons before
    with progress.task("verifying", total, "blocks and exits") as task:
        for window in windows:
            expected = compare_parts(parts, reference, window, comparisons, task)
            compare_full_depth(parts, window, expected, comparisons)
            task.advance()
            if not window.long_context:  # no exit head knows of positions, and blocks few
                jump = _as_map(parts, checkpoint, expected)
                head = language_head(checkpoint)
                compare_exits(parts, window, expected, jump, head, comparisons, task)
    return comparisons.checks()


def make_windows(checkpoint: Checkpoint, token_ids: Int32) -> list[Window]:
    """Cuts token ids [B,S] to lengths at which transformers without a cache is the reference.

    LongRoPE gives two windows where there are tokens for both sets of factors. Dynamic RoPE is
    followed within the trained length alone.

    Raises:
        UsageError: Fewer than 8 tokens a sequence.
    """
    spec, rotary = checkpoint.spec, checkpoint.family.rotary(checkpoint.config)
    batch, length = token_ids.shape
    if spec.learned_positions or (rotary is not None and rotary.kind == "dynamic"):
        length = min(length, spec.max_positions)
    short = min(length, spec.rotary_switch or length)
    if short < SHORTEST:
        raise UsageError(
            f"{short} tokens a sequence are too few to verify with",
            hint=f"give {SHORTEST} or more",
        )
    windows = [Window(token_ids[:, :short])]
    # Every step of the decode check must be in the long context.
    if length > short + batch + DECODED:
        windows.append(Window(token_ids[:, :length], long_context=True))
    return windows


def compare_parts(
    parts: Parts,
    reference: TransformersReference,
    window: Window,
    comparisons: Comparisons,
    task: Task,
) -> Reference:
    """Runs every graph and engine but the exit head on the reference's own inputs."""
    batch, length = window.token_ids.shape
    per_row = min(length, max(1, EXIT_POSITIONS // batch))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)).copy()
    graphs = PortableGraphs(parts.spec, parts.graphs)
    rotations: dict[str, Float32] = {}
    previous: Float32 = np.empty(0, np.float32)
    exits: dict[int, Float32] = {}

    def visit(depth: int, hidden: Float32) -> None:
        nonlocal previous, rotations
        engines = parts.open_engines()
        name = block_name(depth - 1) if depth else "embed"

        def record(what: str, actual: Float32) -> None:
            comparisons.record(f"{what} {name}{window.label}", "hidden", actual, hidden)

        if depth == 0:
            embedded, rotations = graphs.embed(
                window.token_ids, positions, long_context=window.long_context
            )
            record("graph", embedded)
            record("engine", embed_batch(engines, window.token_ids))
        else:
            for actual in _graph_in_pieces(graphs, depth - 1, previous, positions, rotations):
                record("graph", actual)
            pieces = engine_in_pieces(
                engines, depth - 1, previous, long_context=window.long_context
            )
            for actual in pieces:
                record("engine", actual)
        if 0 < depth < parts.spec.blocks:
            exits[depth] = hidden[:, :per_row].copy()
        previous = hidden.copy()
        if depth == parts.spec.blocks:
            graphs.close()  # their memory goes before the reference takes its head's
            engines.unload_heads()
        task.advance()

    logits = reference.forward(window.token_ids, visit)
    last, flat = previous.reshape(batch * length, -1), logits.reshape(batch * length, -1)
    name = f"final_head{window.label}"
    comparisons.record(f"graph {name}", "logits", graphs.logits(last, parts.spec.blocks), flat)
    graphs.close()
    engines = parts.open_engines()
    comparisons.record(f"engine {name}", "logits", engines.logits(last, parts.spec.blocks), flat)
    return Reference(logits, exits)


def _graph_in_pieces(
    graphs: PortableGraphs,
    block: int,
    hidden: Float32,
    positions: Int32,
    rotations: dict[str, Float32],
) -> list[Float32]:
    """A block's output [B,S,H] in one piece; and in two, the first's keys and values as past."""
    whole, _ = graphs.block(block, hidden, positions, rotations)
    pieces, past = [], None
    for part in (slice(hidden.shape[1] // 2), slice(hidden.shape[1] // 2, None)):
        turned = {name: array[:, part] for name, array in rotations.items()}
        piece, past = graphs.block(block, hidden[:, part], positions[:, part], turned, past)
        pieces.append(piece)
    return [whole, np.concatenate(pieces, axis=1)]


def compare_full_depth(
    parts: Parts, window: Window, expected: Reference, comparisons: Comparisons
) -> None:
    """Runs sequences of different lengths through all blocks: at once, and token by token."""
    ids = window.token_ids
    batch, length = ids.shape
    lengths = [length - row % (length - SHORTEST + 1) for row in range(batch)]
    session = Session(parts.spec, parts.open_engines(), batch, length)
    name = f"full depth{window.label}"
    logits = session.advance(
        [ids[row, :end].tolist() for row, end in enumerate(lengths)], every_position=True
    )
    for row, end in enumerate(lengths):
        comparisons.record(f"logits {name}", "logits", logits[row], expected.logits[row, :end])
    for row, end in enumerate(lengths):
        session.rewind(0, row)
        lengths[row] = end - DECODED
    session.advance([ids[row, :start].tolist() for row, start in enumerate(lengths)])
    for step in range(DECODED):
        at = [start + step for start in lengths]
        decoded = session.advance([[int(ids[row, position])] for row, position in enumerate(at)])
        target = np.stack([expected.logits[row, position] for row, position in enumerate(at)])
        comparisons.record(f"decode {name}", "logits", decoded, target)


def _as_map(
    parts: Parts, checkpoint: Checkpoint, expected: Reference
) -> RowShortcut | BlocksOnSequences:
    """The shortcut as a map of the reference's hidden states."""
    if not isinstance(parts.shortcut, BlockShortcut):
        return parts.shortcut
    count = next(iter(expected.exits.values())).shape[1]
    rotary = checkpoint.family.rotary(checkpoint.config)
    tables = None if rotary is None else rotary.tables(count)
    return BlocksOnSequences(parts.shortcut, parts.spec, tables, count)


def compare_exits(
    parts: Parts,
    window: Window,
    expected: Reference,
    jump: RowShortcut | BlocksOnSequences,
    head: LanguageHead,
    comparisons: Comparisons,
    task: Task,
) -> None:
    """Compares every exit with the shortcut in float64 on the reference's hidden states."""
    engines = parts.open_engines()
    # Each block runs once and each head at every exit: so heads stay open, and blocks don't.
    close_all(engines, parts.spec)
    engines = FrugalEngines(engines, keep_heads=True)
    graphs = PortableGraphs(parts.spec, parts.graphs)
    heads = ExitHeads(parts.spec, graphs, engines, parts.shortcut, parts.check_tokens)
    exits = exits_of(parts.shortcut, parts.spec.blocks)
    batch, count, _ = expected.exits[exits[0]].shape
    session, tokens = Session(parts.spec, engines, batch, count), window.token_ids[:, :count]
    for blocks_run in exits:
        hidden = expected.exits[blocks_run]
        exact = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64)
        target = head.logits(jump.apply(exact, blocks_run))
        allowance = exit_allowance(jump, head.norm, exact, target, parts.precision, blocks_run)
        heads.compare(tokens, hidden, blocks_run, target, allowance, comparisons)
        if blocks_run == exits[0]:
            logits = session.advance(tokens.tolist(), blocks_run, every_position=True)
        else:  # the tokens that stopped at the exit before run one block more
            logits = session.deepen(blocks_run, every_position=True)
        name = f"logits exit {blocks_run}"
        comparisons.record(name, "logits", np.concatenate(logits), target, allowance)
        task.advance()


def language_head(checkpoint: Checkpoint) -> LanguageHead:
    """The final norm and the LM head with the checkpoint's own weights."""
    spec = checkpoint.spec
    sources = checkpoint.family.ends(checkpoint.config, spec)

    def read(name: str) -> NDArray[Any]:
        return checkpoint.read(sources[name])

    norm = FinalNorm(
        spec.norm,
        read("final_norm.weight"),
        read("final_norm.bias") if "final_norm.bias" in sources else None,
        spec.norm_epsilon,
    )
    weight = read("token_embedding" if spec.tied_head else "head")
    return LanguageHead(norm, weight, None, spec.logit_softcap)
