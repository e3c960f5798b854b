"""The graphs of a draft layer: memory of the model's states, the layer, and its head.

    states ── fuse ── memory          of positions that the model has run; a chain's is its output

    token_ids ─ embedding ─ norm ─┐
    memory ──────────────── norm ─┴─ qkv ─ attention ─ out ─(+)─ norm ─ MLP ─(+)─ output
       └────────────────────────────────────────────────────┘

What it computes: `bundle.draft_shortcut`. The layer is a block of a model of its own (`ModelSpec`
with one block), so that each dialect's attention and MLP run it.
"""

from __future__ import annotations

import onnx

from ojfa_export.graphs.block import after_attention
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.graph import FLOAT, INT32
from ojfa_export.graphs.heads import final_head_graph
from ojfa_export.models.spec import ModelSpec


def draft_part_graph(
    name: str, spec: ModelSpec, weights: Weights, dialect: Portable
) -> onnx.ModelProto:
    """Emits one of `names.DRAFT_GRAPHS`.

    Args:
        name: Which.
        spec: The layer, as a model of one block.
        weights: The graph's weights.
        dialect: The operators to write it in, of the layer's spec.
    """
    if name == "draft_memory":
        return draft_memory_graph(spec, weights, dialect)
    if name == "draft":
        return draft_graph(spec, weights, dialect)
    about = "The draft layer's output to logits over its tokens: norm and LM head"
    return final_head_graph(spec, weights, dialect, name, about)


def draft_memory_graph(spec: ModelSpec, weights: Weights, dialect: Portable) -> onnx.ModelProto:
    """The model's states to what the layer sees.

    Args:
        spec: The layer.
        weights: `fuse.weight` [depths H, H].
        dialect: The operators to write it in.
    """
    graph = dialect.graph(
        "draft_memory", "Hidden states after several depths, side by side, to the draft layer's"
    )
    states = graph.input("states", FLOAT, "rows", weights["fuse.weight"].dims[0])
    memory = dialect.linear(graph, dialect.to_compute(graph, states), weights, "fuse")
    graph.output(memory, "memory", FLOAT, "rows", spec.hidden_size)
    return graph.model()


def draft_graph(spec: ModelSpec, weights: Weights, dialect: Portable) -> onnx.ModelProto:
    """The draft layer: a block that also sees the embedding of each position's next token.

    Args:
        spec: The layer.
        weights: `token_embedding` [V, H] of the model, `embedding.norm.weight` [H], and those of
            a block, whose `attention.qkv.weight` [2 H, ...] has the embedding's rows first.
        dialect: The operators to write it in.
    """
    graph = dialect.graph("draft", "The draft layer: memory and each next token to its output")
    hidden = graph.input("hidden", FLOAT, *dialect.token_axes, spec.hidden_size)
    ids = graph.input("token_ids", INT32, *dialect.token_axes)
    dialect.attention_inputs(graph)
    table = weights["token_embedding"]
    embedded = graph.op("Gather", graph.weight("token_embedding", table), ids)
    embedded = graph.cast(embedded, FLOAT) if table.dtype != FLOAT else embedded
    both = [
        dialect.norm(graph, embedded, weights, "embedding.norm"),
        dialect.norm(graph, hidden, weights, "attention.norm"),
    ]
    seen = graph.op("Concat", *both, axis=-1)
    qkv = dialect.linear(graph, seen, weights, "attention.qkv")
    mixed = dialect.attention(graph, qkv, 0, weights)
    result = after_attention(graph, hidden, mixed, weights, dialect)
    graph.output(result, "hidden_out", FLOAT, *dialect.token_axes, spec.hidden_size)
    return graph.model()
