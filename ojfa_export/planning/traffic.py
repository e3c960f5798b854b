"""Bytes that a decode step must read from memory."""

from __future__ import annotations

from ojfa_export.models.spec import ModelSpec

# ONNX Runtime's CPU provider multiplies in fp32, whatever precision the weights are stored in.
FLOAT_BYTES = 4


def block_bytes(spec: ModelSpec) -> int:
    """Weights of one block. Biases are left out: they are less than a thousandth."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    attended = spec.heads * spec.head_dim
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    mlp = (3 if spec.gated else 2) * hidden * inner
    return FLOAT_BYTES * (hidden * (qkv + attended) + mlp + 2 * hidden)


def head_bytes(spec: ModelSpec, exit_rank: int | None, *, residual: bool = False) -> int:
    """Weights of the exit head of this rank, or of the model's own head.

    A residual exit head is the model's own with the jump before it.
    """
    own = FLOAT_BYTES * spec.hidden_size * (spec.vocab_size + 1)
    if exit_rank is None:
        return own
    if residual:
        return own + FLOAT_BYTES * exit_rank * (2 * spec.hidden_size + 1)
    return FLOAT_BYTES * exit_rank * (spec.vocab_size + spec.hidden_size + 1)


def cache_bytes(spec: ModelSpec, length: int) -> int:
    """Keys and values that one block reads when its newest token is the `length`-th."""
    seen = length if spec.window is None else min(length, spec.window)
    return FLOAT_BYTES * 2 * spec.kv_heads * spec.head_dim * seen


def decode_bytes(
    spec: ModelSpec,
    blocks: int,
    length: int,
    exit_rank: int,
    *,
    residual: bool = False,
    element_bytes: int = FLOAT_BYTES,
) -> int:
    """Everything that one token reads.

    Args:
        spec: The model.
        blocks: Blocks run; all of them means the model's own head.
        length: Tokens of the sequence, the new one included.
        exit_rank: Of the shortcut.
        residual: Whether the exit head is that of a residual shortcut.
        element_bytes: Of a weight and of the cache; what stays fp32 in fp16 models (norms, the
            exit head's first matrix) is counted as if it didn't.
    """
    rows = (2 if spec.learned_positions else 1) * FLOAT_BYTES * spec.hidden_size
    head = head_bytes(spec, None if blocks == spec.blocks else exit_rank, residual=residual)
    total = rows + blocks * (block_bytes(spec) + cache_bytes(spec, length)) + head
    return total // FLOAT_BYTES * element_bytes
