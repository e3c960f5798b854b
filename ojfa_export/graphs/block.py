"""One decoder block.

    hidden ─ norm ─ qkv ─ attention ─ out ─(+)─ norm ─ up ─ activation ─ down ─(+)─ hidden
       └─────────────────────────────────┘ └────────────────────────────────┘

Or with the norms after attention and MLP, before what those give is added (`ModelSpec.norms`):

    hidden ─ qkv ─ attention ─ out ─ norm ─(+)─ up ─ activation ─ down ─ norm ─(+)─ hidden
       └────────────────────────────────────┘ └─────────────────────────────────┘

Or with norms in both places; or side by side, both of the block's input (`ModelSpec.parallel`).

Weights: attention.norm, attention.qkv, attention.out, mlp.norm, mlp.up (gate and up side by side
where gated), mlp.down; each `.weight` and, where the family has it, `.bias`. Where queries and keys
have norms attention.q_norm and attention.k_norm; with norms in both places attention.after_norm and
mlp.after_norm.
"""

from __future__ import annotations

import onnx

from ojfa_export.bundle.names import block_name
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.graph import FLOAT, INT32, Graph
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
    result = run_block(graph, hidden, index, weights, dialect)
    graph.output(result, "hidden_out", FLOAT, *dialect.token_axes, spec.hidden_size)
    return graph.model()


def exit_block_graph(
    spec: ModelSpec, name: str, weights: Weights, dialect: Portable
) -> onnx.ModelProto:
    """Emits a block that stands behind exits: what it computes is in `bundle.block_shortcut`.

    Each token says of which of the shortcut's exits it is, which picks its scale and shift.

    Args:
        spec: The model.
        name: Of the graph.
        weights: Those of a block, and `exit.scale` and `exit.shift` [exits, H], fp32.
        dialect: The operators to write it in.
    """
    graph = dialect.graph(
        name, f"A block behind exits: their output to the last block's of a {spec.family} model"
    )
    hidden = graph.input("hidden", FLOAT, *dialect.token_axes, spec.hidden_size)
    exit = graph.input("exit", INT32, *dialect.token_axes)
    dialect.attention_inputs(graph)
    scale, shift = (
        graph.op("Gather", graph.weight(each, weights[each]), exit)
        for each in ("exit.scale", "exit.shift")
    )
    scaled = graph.op("Add", graph.op("Mul", hidden, scale), shift)
    result = run_block(graph, scaled, spec.blocks - 1, weights, dialect)
    graph.output(result, "hidden_out", FLOAT, *dialect.token_axes, spec.hidden_size)
    return graph.model()


def run_block(graph: Graph, hidden: str, index: int, weights: Weights, dialect: Portable) -> str:
    """All of a block.

    Args:
        graph: Its graph, with the inputs of attention.
        hidden: What goes in, fp32.
        index: Of the model's block whose attention it has, from 0.
        weights: The block's weights.
        dialect: The operators to write it in.

    Returns:
        What comes out, fp32.
    """
    if dialect.spec.norms_are("before"):
        seen = dialect.norm(graph, hidden, weights, "attention.norm")
    else:
        seen = dialect.to_compute(graph, hidden)
    qkv = dialect.linear(graph, seen, weights, "attention.qkv")
    mixed = dialect.attention(graph, qkv, index, weights)
    return after_attention(graph, hidden, mixed, weights, dialect)


def after_attention(
    graph: Graph, hidden: str, mixed: str, weights: Weights, dialect: Portable
) -> str:
    """Output projection, residual, norm, MLP, residual; or as the module has it.

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
    spec = dialect.spec
    after, norm_after = spec.norms_are("after"), spec.norm_name("after")
    if spec.parallel:
        attended = dialect.residual(graph, hidden, out)
        seen = dialect.norm(graph, hidden, weights, "mlp.norm")
    elif spec.norms == "both":
        given = dialect.widened(graph, out)
        normed = dialect.float_norm(graph, given, weights, f"attention.{norm_after}")
        attended, seen = dialect.add_and_norm(graph, hidden, normed, weights, "mlp.norm")
    elif after:
        attended = dialect.add_normed(graph, hidden, out, weights, f"attention.{norm_after}")
        seen = dialect.to_compute(graph, attended)
    else:
        attended, seen = dialect.add_and_norm(graph, hidden, out, weights, "mlp.norm")
    inner = dialect.inner(graph, dialect.linear(graph, seen, weights, "mlp.up"))
    down = dialect.linear(graph, inner, weights, "mlp.down")
    if after:
        return dialect.add_normed(graph, attended, down, weights, f"mlp.{norm_after}")
    return dialect.residual(graph, attended, down)
