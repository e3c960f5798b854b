"""Blocks in the operators of ONNX Runtime's CUDA provider, weights as inputs.

fp16 blocks attend with GroupQueryAttention, which writes the cache in place and reads only the rows
in use. The provider has it in 16 bits only, so fp32 blocks attend in standard operators: they write
the new rows in place as well, and look at the whole cache, masked. Both find positions
in device memory, so that a recorded CUDA graph serves every position.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ojfa_export.backends.onnxruntime.dialect import OnnxRuntimeDialect
from ojfa_export.graphs.dialect import MASKED, Weights
from ojfa_export.graphs.graph import FLOAT, FLOAT16, INT32, INT64, MICROSOFT, Graph, WeightInputs
from ojfa_export.graphs.weights import TensorRef
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# The last opset in which LayerNormalization may read fp32 and write fp16.
OPSET = 16


class CudaGraph(WeightInputs):
    """A graph for the provider, whose weights are inputs."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description, OPSET)


class OnnxRuntimeCuda(OnnxRuntimeDialect):
    """For the CUDA provider.

    Hidden states, norms, softmax and logits are fp32; in fp16, matrix products, activations and
    rotations are fp16, and products are summed in fp32.

    Args:
        spec: The model.
        precision: Of matrix products and of the cache.
    """

    def __init__(self, spec: ModelSpec, precision: Precision) -> None:
        super().__init__(spec, precision)
        self._half = precision == "fp16"

    def graph(self, name: str, description: str) -> Graph:
        """A new graph."""
        return CudaGraph(name, description)

    def vector(self, graph: Graph, name: str, ref: TensorRef) -> str:
        """A norm's parameter or a bias in compute precision: so norms give that without a cast."""
        return graph.weight(name, replace(ref, dtype=FLOAT16 if self._half else FLOAT))

    def linear(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """x @ W (+ b), all in compute precision."""
        y: str = graph.op("MatMul", x, graph.weight(f"{name}.weight", weights[f"{name}.weight"]))
        if f"{name}.bias" in weights:
            bias = f"{name}.bias"
            y = graph.op("Add", y, self.vector(graph, bias, weights[bias]))
        return y

    def widened(self, graph: Graph, y: str) -> str:
        """What `linear` gave, in fp32."""
        return self.to_float(graph, y)

    def norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """RMSNorm or LayerNorm as one node."""
        if not self._half:
            return super().norm(graph, x, weights, name)
        # The provider's fused sum and norm and a cast take less time than its norm that casts
        # (bench/NOTES.md). Doubling is exact, and norms take it back where epsilon is fourfold.
        return self._skip_norm(graph, x, x, weights, name, 4 * self.spec.norm_epsilon)[1]

    def add_and_norm(
        self, graph: Graph, x: str, y: str, weights: Weights, name: str
    ) -> tuple[str, str]:
        """The sum of hidden states and of what `linear` gave, and its norm, in fp32."""
        epsilon = self.spec.norm_epsilon
        return self._skip_norm(graph, x, self.to_float(graph, y), weights, name, epsilon)

    def _skip_norm(
        self, graph: Graph, x: str, y: str, weights: Weights, name: str, epsilon: float
    ) -> tuple[str, str]:
        total, normed = self.skip_norm(graph, x, y, weights, name, epsilon)
        return total, self.to_compute(graph, normed)

    def unit_norm(self, graph: Graph, x: str, width: int) -> str:
        """RMSNorm without a weight."""
        ones = graph.constant(np.ones(width), np.float16 if self._half else np.float32)
        epsilon = self.spec.norm_epsilon
        kind = "SimplifiedLayerNormalization"
        return str(graph.op(kind, x, ones, axis=-1, epsilon=epsilon, stash_type=1))

    def inner(self, graph: Graph, up: str) -> str:
        """The MLP between its matrices, in compute precision throughout."""
        return self.activated(graph, up, self.spec.intermediate_size)

    def attention_inputs(self, graph: Graph) -> None:
        """The cache, rotations, and where the new tokens are."""
        if self._half:
            super().attention_inputs(graph)
            return
        spec = self.spec
        graph.input("positions", INT32, "batch", "tokens")
        graph.input("key_positions", INT32, "capacity")
        for name in spec.rotations:
            graph.input(f"rotary_{name}_table", FLOAT, "rows", spec.rotary_dim // 2)
        for name in ("past_key", "past_value"):
            graph.input(name, FLOAT, "batch", spec.kv_heads, "capacity", spec.head_dim)

    def attention(self, graph: Graph, qkv: str, block: int, weights: Weights) -> str:
        """Attention in place: see the module.

        The operators are those that need nothing of the host: some others (uneven Split and
        Concat, batches of products that differ, ScatterND) fetch small arrays from host memory and
        free them by a callback, which a recorded graph would do again at every replay.
        """
        if self._half:
            return super().attention(graph, qkv, block, weights)
        spec = self.spec
        q, new_key, new_value = self._heads(graph, qkv, block, weights)
        shape = (spec.kv_heads, 1, spec.head_dim)
        slots = graph.op("Unsqueeze", "positions", graph.constant([1, 3], np.int64))
        slots = graph.op("Add", slots, graph.constant(np.zeros(shape), np.int32))
        key, value = (
            graph.op("ScatterElements", past, slots, new, axis=2)
            for past, new in (("past_key", new_key), ("past_value", new_value))
        )
        # Heads that share keys are rows of one product.
        q = graph.reshape(q, 0, spec.kv_heads, -1, spec.head_dim)
        scale = spec.attention_scales[block]
        scores = graph.op("FusedMatMul", q, key, domain=MICROSOFT, transB=1, alpha=scale)
        capped = self.softcapped(graph, scores, spec.attention_softcap)
        masked = graph.op("Add", capped, self._whole_mask(graph, block))
        mixed = graph.op("MatMul", graph.op("Softmax", masked, axis=-1), value)
        self.cache_outputs(graph, key, value)
        mixed = graph.reshape(mixed, 0, spec.heads, -1, spec.head_dim)
        mixed = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.reshape(mixed, 0, 0, spec.heads * spec.head_dim)

    def _heads(self, graph: Graph, qkv: str, block: int, weights: Weights) -> tuple[str, str, str]:
        """Rotated q and k, and v: [batch, heads, tokens, head_dim]."""
        spec = self.spec
        q, k, v = self.normed_parts(graph, qkv, weights)
        if spec.rotary_dim_of(block):
            q = self._rotated(graph, q, spec.heads, block)
            k = self._rotated(graph, k, spec.kv_heads, block)
        heads = [
            graph.op("Transpose", graph.reshape(part, 0, 0, -1, spec.head_dim), perm=[0, 2, 1, 3])
            for part in (q, k, v)
        ]
        return heads[0], heads[1], heads[2]

    def _rotated(self, graph: Graph, x: str, heads: int, block: int) -> str:
        result: str = graph.op(
            "RotaryEmbedding",
            x,
            graph.cast("positions", INT64),
            *(f"rotary_{name}_table" for name in self.spec.rotations_of(block)),
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=self.spec.rotary_dim,
        )
        return result

    def _whole_mask(self, graph: Graph, block: int) -> str:
        """[batch, 1, heads of a key * tokens, capacity]: 0 where a query sees a row, or MASKED."""
        queries = graph.op("Unsqueeze", "positions", graph.constant([2], np.int64))
        visible = graph.op("LessOrEqual", "key_positions", queries)
        if (window := self.spec.window_of(block)) is not None:
            oldest = graph.op("Sub", queries, graph.constant(window, np.int32))
            visible = graph.op("And", visible, graph.op("Greater", "key_positions", oldest))
        mask = graph.op(
            "Where", visible, graph.constant(0, np.float32), graph.constant(MASKED, np.float32)
        )
        mask = graph.op("Unsqueeze", mask, graph.constant([1], np.int64))
        group = self.spec.heads // self.spec.kv_heads
        return str(graph.op("Concat", *[mask] * group, axis=2)) if group > 1 else mask
