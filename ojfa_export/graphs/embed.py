"""Token ids to the first block's hidden states, and positions to rotations."""

from __future__ import annotations

import numpy as np
import onnx

from ojfa_export.graphs.dialect import Weights
from ojfa_export.graphs.graph import FLOAT, INT32, Graph
from ojfa_export.models.spec import FIRST, SECOND, ModelSpec


def embed_graph(
    spec: ModelSpec,
    weights: Weights,
    rotary_rows: int,
    *,
    rotations: bool = True,
    graph_type: type[Graph] = Graph,
) -> onnx.ModelProto:
    """Emits the embedding.

    Args:
        spec: The model.
        weights: `token_embedding` [V, H]; `position_embedding` [P, H] or `rotary_cos` and
            `rotary_sin` [rows, rotary_dim/2].
        rotary_rows: Rows of one set of rotary factors; a second set follows the first.
        rotations: Whether to emit the rotations; a backend whose attention rotates by itself
            needs the hidden states alone.
        graph_type: Where weights are: in files, or inputs.
    """
    graph = graph_type("embed", "Token ids to hidden states, and the rotations of their positions")
    ids = graph.input("token_ids", INT32, "batch", "tokens")
    if spec.learned_positions or rotations:
        positions = graph.input("positions", INT32, "batch", "tokens")
    table = weights["token_embedding"]
    hidden = graph.op("Gather", graph.weight("token_embedding", table), ids)
    hidden = graph.cast(hidden, FLOAT) if table.dtype != FLOAT else hidden
    if spec.learned_positions:
        rows = weights["position_embedding"]
        learned = graph.op("Gather", graph.weight("position_embedding", rows), positions)
        learned = graph.cast(learned, FLOAT) if rows.dtype != FLOAT else learned
        hidden = graph.op("Add", hidden, learned)
    elif rotations:
        if spec.rotary_switch is not None:
            long = graph.input("long_context", INT32)
            offset = graph.op("Mul", long, graph.constant(rotary_rows, np.int32))
            positions = graph.op("Add", positions, offset)
        rows_of = {FIRST: positions}
        if spec.rotated_second:
            offset = graph.constant(rotary_rows, np.int32)
            rows_of[SECOND] = graph.op("Add", positions, offset)
        tables = [graph.weight(f"rotary_{name}_table", weights[f"rotary_{name}"]) for name in FIRST]
        for names, wanted in rows_of.items():
            for name, rotary in zip(names, tables, strict=True):
                gathered = graph.op("Gather", rotary, wanted)
                half = spec.rotary_dim // 2
                graph.output(gathered, f"rotary_{name}", FLOAT, "batch", "tokens", half)
    graph.output(hidden, "hidden", FLOAT, "batch", "tokens", spec.hidden_size)
    return graph.model()
