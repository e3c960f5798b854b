"""One decoder block.

    hidden ─ norm ─ qkv ─ attention ─ out ─(+)─ norm ─ up ─ activation ─ down ─(+)─ hidden
       └─────────────────────────────────┘ └────────────────────────────────┘

Weights: attention.norm, attention.qkv, attention.out, mlp.norm, mlp.up (gate and up side by side
where gated), mlp.down; each `.weight` and, where the family has it, `.bias`.
"""

from __future__ import annotations

import onnx

from ojfa_export.bundle.names import block_name
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.graph import FLOAT, Graph
from ojfa_export.models.spec import ModelSpec


def block_graph(
    spec: ModelSpec, index: int, weights: Weights, dialect: Portable
) -> onnx.ModelProto:
    """Emits a block.

    Args:
        spec: The model.
        index: Which block, from 0.
        weights: The block's weights.
        dialect: The operators to write it in.
    """
    graph = dialect.graph(
        block_name(index), f"Block {index + 1} of {spec.blocks} of a {spec.family} model"
    )
    hidden = graph.input("hidden", FLOAT, *dialect.token_axes, spec.hidden_size)
    dialect.attention_inputs(graph)
    normed = dialect.norm(graph, hidden, weights, "attention.norm")
    mixed = dialect.attention(graph, dialect.linear(graph, normed, weights, "attention.qkv"), index)
    result = after_attention(graph, hidden, mixed, weights, dialect)
    graph.output(result, "hidden_out", FLOAT, *dialect.token_axes, spec.hidden_size)
    return graph.model()


def after_attention(
    graph: Graph, hidden: str, mixed: str, weights: Weights, dialect: Portable
) -> str:
    """Output projection, residual, norm, MLP, residual.

    Args:
        graph: The block's graph.
        hidden: The block's input, fp32.
        mixed: What attention gave, in compute precision.
        weights: The block's weights.
        dialect: The operators to write it in.

    Returns:
        The block's output, fp32.
    """
    out = dialect.linear(graph, mixed, weights, "attention.out")
    attended, normed = dialect.add_and_norm(graph, hidden, out, weights, "mlp.norm")
    inner = dialect.inner(graph, dialect.linear(graph, normed, weights, "mlp.up"))
    return dialect.residual(graph, attended, dialect.linear(graph, inner, weights, "mlp.down"))
