"""Engines for ONNX Runtime's CUDA provider: the same graphs in its operators, weights as inputs."""

from __future__ import annotations

from pathlib import Path

import onnx

from ojfa_export.backends.onnxruntime.dialect import check_fused_attention
from ojfa_export.backends.onnxruntime_cuda.dialect import CudaGraph, OnnxRuntimeCuda
from ojfa_export.backends.onnxruntime_cuda.plan import NAME, GraphPlan, Weight
from ojfa_export.bundle.names import CHECK_HEAD, EXIT_BLOCK, block_name, exit_block_name
from ojfa_export.graphs.block import block_graph, exit_block_graph
from ojfa_export.graphs.dialect import Weights
from ojfa_export.graphs.embed import embed_graph
from ojfa_export.graphs.heads import final_head_graph, jump_head_graph
from ojfa_export.graphs.weights import references
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.atomic import write_atomically

PRECISIONS: dict[int, Precision] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
}


def build_engine(spec: ModelSpec, graph: Path, plan: Path) -> None:
    """Builds the graph of one portable graph, unless an equal block has it, and writes its plan.

    Args:
        spec: The model.
        graph: The portable graph; its weight references are reused.
        plan: The plan to write; graphs are beside it.

    Raises:
        BackendError: A shape that ONNX Runtime's fused attention doesn't take.
    """
    refs = references(onnx.load(graph, load_external_data=False))
    half = any(ref.dtype == onnx.TensorProto.FLOAT16 for ref in refs.values())
    if half:
        hint = f"build this model with --precision fp32 for the {NAME} backend"
        check_fused_attention(spec, hint)
    name, model = _model(graph.stem, spec, refs, "fp16" if half else "fp32")
    file = plan.with_name(f"{name}.onnx")
    if not file.exists():
        write_atomically(file, model.SerializeToString(deterministic=True))
    inputs = {each.name: each.type.tensor_type.elem_type for each in model.graph.input}
    described = GraphPlan(
        precision="fp16" if half else "fp32",
        graph=file.name,
        weights={
            key: Weight(
                file=ref.location,
                offset=ref.offset,
                shape=ref.dims,
                stored=PRECISIONS[ref.dtype],
                used=PRECISIONS[inputs[key]],
            )
            for key, ref in refs.items()
            if key in inputs
        },
    )
    write_atomically(plan, described.model_dump_json(indent=2).encode())


def _model(
    name: str, spec: ModelSpec, weights: Weights, precision: Precision
) -> tuple[str, onnx.ModelProto]:
    """The graph that a portable graph becomes, and its file's name without suffix."""
    dialect = OnnxRuntimeCuda(spec, precision)
    if name == "embed":
        return name, embed_graph(spec, weights, 0, rotations=False, graph_type=CudaGraph)
    if name == "final_head":
        return name, final_head_graph(spec, weights, dialect)
    if name in ("exit_head", CHECK_HEAD):
        return name, jump_head_graph(spec, weights, dialect, name)
    if name.startswith(EXIT_BLOCK):  # all alike
        return exit_block_name(0), exit_block_graph(spec, exit_block_name(0), weights, dialect)
    first = spec.like(int(name.removeprefix("block_")))
    return block_name(first), block_graph(spec, first, weights, dialect)
