"""Engines for ONNX Runtime: the same graphs in its own operators, on the same weight files."""

from __future__ import annotations

from pathlib import Path

import onnx

from ojfa_export.backends.onnxruntime.dialect import OnnxRuntimeCpu, check_fused_attention
from ojfa_export.bundle.names import CHECK_HEAD, DRAFT_GRAPHS, EXIT_BLOCK
from ojfa_export.graphs.block import block_graph, exit_block_graph
from ojfa_export.graphs.draft import draft_part_graph
from ojfa_export.graphs.embed import embed_graph
from ojfa_export.graphs.heads import final_head_graph, jump_head_graph
from ojfa_export.graphs.quantised import format_of
from ojfa_export.graphs.weights import references
from ojfa_export.models.spec import ModelSpec


def build_engine(spec: ModelSpec, graph: Path, engine: Path) -> None:
    """Builds the engine of one graph.

    Args:
        spec: The model.
        graph: The portable graph; its weight references are reused.
        engine: The file to write.

    Raises:
        BackendError: A shape that ONNX Runtime's fused attention doesn't take.
    """
    name = graph.stem
    what = "draft layer" if name in DRAFT_GRAPHS else "model"
    check_fused_attention(spec, f"this {what} can't be built for the onnxruntime backend")
    portable = onnx.load(graph, load_external_data=False)
    weights, dialect = references(portable), OnnxRuntimeCpu(spec, format_of(portable))
    if name == "embed":
        model = embed_graph(spec, weights, 0, rotations=False)
    elif name == "final_head":
        model = final_head_graph(spec, weights, dialect)
    elif name in DRAFT_GRAPHS:
        model = draft_part_graph(name, spec, weights, dialect)
    elif name in ("exit_head", CHECK_HEAD):
        model = jump_head_graph(spec, weights, dialect, name)
    elif name.startswith(EXIT_BLOCK):
        model = exit_block_graph(spec, name, weights, dialect)
    else:
        model = block_graph(spec, int(name.removeprefix("block_")), weights, dialect)
    engine.write_bytes(model.SerializeToString(deterministic=True))
