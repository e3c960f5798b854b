"""Graphs for TensorRT: a block in two parts around its attention, weights as inputs.

Attention over the cache is a CUDA kernel of ours between the two parts: it writes the cache in
place and reads positions from device memory, where a TensorRT 8.6 graph copies the whole cache in
every step. What is left works on tokens one by one, [tokens, features], whatever sequence they
belong to.

Weights are inputs, not constants. So equal blocks are one engine, built once and a few kilobytes
large; weights are in device memory once, as [outputs, inputs], for engines and kernels alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from ojfa_export.backends.tensorrt.plan import MLP, QKV
from ojfa_export.bundle.names import CHECK_HEAD, DRAFT_GRAPHS, EXIT_BLOCK, OF_EXITS
from ojfa_export.graphs.block import after_attention
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.graph import FLOAT, Graph, WeightInputs
from ojfa_export.graphs.heads import exit_head_graph, final_head_graph
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec


class TensorRtDialect(Portable):
    """Matrix products with weights [outputs, inputs]."""

    def graph(self, name: str, description: str) -> Graph:
        """A new graph."""
        return WeightInputs(name, description)

    def linear(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """x @ W (+ b) for x [tokens, inputs]: x in compute precision, the result fp32."""
        ref = weights[f"{name}.weight"]
        turned = replace(ref, dims=ref.dims[::-1])
        y = self.to_float(
            graph, graph.op("Gemm", x, graph.weight(f"{name}.weight", turned), transB=1)
        )
        if f"{name}.bias" not in weights:
            return y
        return str(graph.op("Add", y, graph.weight(f"{name}.bias", weights[f"{name}.bias"])))


def transposed(name: str) -> bool:
    """Whether a weight lies in device memory as [outputs, inputs], unlike in its file."""
    return name.startswith(("attention.", "mlp.", "fuse.")) and name.endswith(
        ("qkv.weight", "out.weight", "up.weight", "down.weight", "fuse.weight")
    )


def parts(
    name: str, spec: ModelSpec, weights: Weights, precision: Precision
) -> Mapping[str, onnx.ModelProto]:
    """The graphs that a portable graph becomes, by file name without suffix.

    Args:
        name: Of the portable graph. The embedding, a jump that isn't folded and a draft layer are
            kernels and give none.
        spec: The model.
        weights: What the portable graph refers to.
        precision: Of matrix products.
    """
    dialect = TensorRtDialect(spec, precision)
    if name == "embed" or name in DRAFT_GRAPHS:
        return {}
    if name == CHECK_HEAD and "head" in weights:  # behind a jump's kernels
        return {name: final_head_graph(spec, weights, dialect)}
    is_jump = not weights.keys().isdisjoint(OF_EXITS)
    if is_jump and not name.startswith(EXIT_BLOCK):  # kernels, and the final head's
        return {}
    if name in ("exit_head", CHECK_HEAD):
        return {name: exit_head_graph(spec, weights, dialect, name)}
    if name == "final_head":
        return {name: final_head_graph(spec, weights, dialect)}
    return {
        f"block.{QKV}": _qkv_graph(spec, weights, dialect),
        f"block.{MLP}": _mlp_graph(spec, weights, dialect),
    }


def _qkv_graph(spec: ModelSpec, weights: Weights, dialect: TensorRtDialect) -> onnx.ModelProto:
    graph = dialect.graph(QKV, "A block before its attention: norm, then queries, keys and values")
    hidden = graph.input("hidden", FLOAT, "tokens", spec.hidden_size)
    normed = dialect.norm(graph, hidden, weights, "attention.norm")
    result = dialect.linear(graph, normed, weights, "attention.qkv")
    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    graph.output(result, "qkv", FLOAT, "tokens", width)
    return graph.model()


def _mlp_graph(spec: ModelSpec, weights: Weights, dialect: TensorRtDialect) -> onnx.ModelProto:
    graph = dialect.graph(MLP, "A block after its attention: output projection, norm, MLP")
    hidden = graph.input("hidden", FLOAT, "tokens", spec.hidden_size)
    mixed = graph.input("mixed", dialect.compute, "tokens", spec.heads * spec.head_dim)
    result = after_attention(graph, hidden, mixed, weights, dialect)
    graph.output(result, "hidden_out", FLOAT, "tokens", spec.hidden_size)
    return graph.model()
