"""Bytes that a decode step must read from memory."""

from __future__ import annotations

from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.models.spec import ModelSpec

# ONNX Runtime's CPU provider multiplies in fp32, whatever precision the weights are stored in.
FLOAT_BYTES = 4


def block_bytes(spec: ModelSpec) -> int:
    """Weights of one block. Biases are left out: they are less than a thousandth."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    attended = spec.heads * spec.head_dim
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    mlp = (3 if spec.gated else 2) * hidden * inner
    norms = (4 if spec.norms == "both" else 2) * hidden + sum(spec.qk_norm_features)
    return FLOAT_BYTES * (hidden * (qkv + attended) + mlp + norms)


def head_bytes(spec: ModelSpec) -> int:
    """Weights of the model's own head."""
    return FLOAT_BYTES * spec.hidden_size * (spec.vocab_size + 1)


def folded_head_bytes(spec: ModelSpec, rank: int) -> int:
    """Weights of the exit head that a narrow shortcut of this rank is folded into."""
    return FLOAT_BYTES * rank * (spec.vocab_size + spec.hidden_size + 1)


def exit_head_bytes(spec: ModelSpec, shortcut: ShortcutEntry) -> int:
    """Weights of a bundle's exit head; where it can't be folded, the model's own and the jump."""
    if shortcut.width is not None:
        matrices = 3 if spec.gated else 2
        jump = matrices * shortcut.width * spec.hidden_size + 2 * spec.hidden_size
        return head_bytes(spec) + FLOAT_BYTES * jump
    if shortcut.residual:
        return head_bytes(spec) + FLOAT_BYTES * shortcut.low_rank * (2 * spec.hidden_size + 1)
    return folded_head_bytes(spec, shortcut.low_rank)


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
) -> int:
    """Everything that one token reads.

    Args:
        spec: The model.
        blocks: Blocks run; all of them means the model's own head.
        length: Tokens of the sequence, the new one included.
        exit_head: Bytes of the exit head, in fp32.
        element_bytes: Of a weight and of the cache; what stays fp32 in fp16 models (norms, the
            exit head's first matrix) is counted as if it didn't.
    """
    rows = (2 if spec.learned_positions else 1) * FLOAT_BYTES * spec.hidden_size
    head = head_bytes(spec) if blocks == spec.blocks else exit_head
    cache = sum(cache_bytes(spec, block, length) for block in range(blocks))
    total = rows + blocks * block_bytes(spec) + cache + head
    return total // FLOAT_BYTES * element_bytes
