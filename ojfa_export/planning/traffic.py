"""Bytes that a decode step must read from memory."""

from __future__ import annotations

from ojfa_export.bundle.names import block_name
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.bundle.weight_format import BLOCK_MATRICES, WeightFormat
from ojfa_export.models.spec import ModelSpec

# ONNX Runtime's CPU provider multiplies in fp32, whatever precision the weights are stored in.
FLOAT_BYTES = 4


def matrix_bytes(inputs: int, outputs: int, weights: WeightFormat | None) -> int:
    """Of a matrix, with the scales, zero points and offsets of a quantised one."""
    if weights is None:
        return FLOAT_BYTES * inputs * outputs
    groups = -(-weights.rows(inputs) // weights.group_size)
    of_group = 8 * FLOAT_BYTES + (weights.bits if weights.zero_points else 0)
    return outputs * groups * (weights.group_size * weights.bits + of_group) // 8


def block_bytes(spec: ModelSpec, weights: WeightFormat | None = None, block: int = 0) -> int:
    """Weights of one block. Biases are left out: they are less than a thousandth."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    features = (
        (hidden, (spec.heads + 2 * spec.kv_heads) * spec.head_dim),
        (spec.heads * spec.head_dim, hidden),
        (hidden, inner * (2 if spec.gated else 1)),
        (inner, hidden),
    )
    norms = (4 if spec.norms == "both" else 2) * hidden + sum(spec.qk_norm_features)
    total = FLOAT_BYTES * norms
    for name, shape in zip(BLOCK_MATRICES, features, strict=True):
        is_wide = weights is None or not weights.stores(block_name(block), name)
        total += matrix_bytes(*shape, None if is_wide else weights)
    return total


def head_bytes(spec: ModelSpec, weights: WeightFormat | None = None) -> int:
    """Weights of the model's own head."""
    form = None if weights is None else weights.head
    return matrix_bytes(spec.hidden_size, spec.vocab_size, form) + FLOAT_BYTES * spec.hidden_size


def folded_head_bytes(spec: ModelSpec, rank: int, weights: WeightFormat | None = None) -> int:
    """Weights of the exit head that a narrow shortcut of this rank is folded into."""
    form = None if weights is None else weights.head
    whole = form is not None and rank % form.group_size == 0
    vocabulary = matrix_bytes(rank, spec.vocab_size, form if whole else None)
    return vocabulary + FLOAT_BYTES * rank * (spec.hidden_size + 1)


def exit_head_bytes(
    spec: ModelSpec, shortcut: ShortcutEntry, weights: WeightFormat | None = None
) -> int:
    """Weights of a bundle's exit head; where it can't be folded, the model's own and the jump.

    Of a block jump one exit's block, whose keys and values `decode_bytes` counts.
    """
    if shortcut.blocks is not None:
        scaled = FLOAT_BYTES * 2 * spec.hidden_size
        return head_bytes(spec, weights) + block_bytes(spec) + scaled
    if shortcut.width is not None:
        matrices = 3 if spec.gated else 2
        jump = matrices * shortcut.width * spec.hidden_size + 2 * spec.hidden_size
        return head_bytes(spec, weights) + FLOAT_BYTES * jump
    if shortcut.residual:
        return head_bytes(spec, weights) + FLOAT_BYTES * shortcut.low_rank * (
            2 * spec.hidden_size + 1
        )
    return folded_head_bytes(spec, shortcut.low_rank, weights)


def cache_bytes(spec: ModelSpec, block: int, length: int) -> int:
    """Keys and values that a block reads when its newest token is the `length`-th."""
    seen = min(length, spec.window_of(block) or length)
    return FLOAT_BYTES * 2 * spec.kv_heads * spec.head_dim * seen


def decode_bytes(
    spec: ModelSpec,
    blocks: int,
    length: int,
    exit_head: int,
    element_bytes: int = FLOAT_BYTES,
    weights: WeightFormat | None = None,
    *,
    exit_block: bool = False,
) -> int:
    """Everything that one token reads.

    Args:
        spec: The model.
        blocks: Blocks run; all of them means the model's own head.
        length: Tokens of the sequence, the new one included.
        exit_head: Bytes of the exit head, in fp32.
        element_bytes: Of a weight and of the cache; what stays fp32 in fp16 models (norms, the
            exit head's first matrix) is counted as if it didn't.
        weights: What quantised matrices are stored as, where they are.
        exit_block: Whether a block with keys and values of its own stands behind exits.
    """
    rows = (2 if spec.learned_positions else 1) * FLOAT_BYTES * spec.hidden_size
    head = head_bytes(spec, weights) if blocks == spec.blocks else exit_head
    cache = sum(cache_bytes(spec, block, length) for block in range(blocks))
    if exit_block and blocks < spec.blocks:
        cache += cache_bytes(spec, spec.blocks - 1, length)
    matrices = sum(block_bytes(spec, weights, block) for block in range(blocks))
    total = rows + matrices + cache + head
    return total // FLOAT_BYTES * element_bytes
