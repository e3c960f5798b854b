"""How a block's parts are written in ONNX operators.

A dialect is the vocabulary that a graph is emitted in. `Portable` uses standard opset-17 operators
only; a backend may subclass it to name its own fused operators (see backends/).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ojfa_export.bundle.offsets import BASE
from ojfa_export.bundle.weight_format import ORDER, PACKED, SCALES, ZERO_POINTS, WeightFormat
from ojfa_export.graphs.graph import FLOAT, INT32, MICROSOFT, Dim, Graph
from ojfa_export.graphs.quantised import OPERATOR
from ojfa_export.graphs.weights import DATA_TYPES, TensorRef
from ojfa_export.models.float8 import E4M3
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import Activation, ModelSpec

Weights = Mapping[str, TensorRef]
# Score of a key that a query must not see; finite, so that fp16 holds it as well.
MASKED = -30000.0


class Portable:
    """Standard operators, for any runtime.

    Hidden states between graphs, norms, rotations, softmax and logits are fp32 in either
    precision; matrix products are in the precision asked for. "Compute precision" below is that of
    matrix products.

    Args:
        spec: The model.
        precision: Precision of matrix products and of the cache.
        quantised: What quantised matrices are stored as, where there are some; those of whole
            numbers are run by the one operator here that is not standard.

    Attributes:
        token_axes: The axes of hidden states before their features.
        accuracy_level: Of products with quantised matrices: MatMulNBits' attribute.
    """

    token_axes: tuple[str, ...] = ("batch", "tokens")
    accuracy_level: int = 0

    def __init__(
        self, spec: ModelSpec, precision: Precision, quantised: WeightFormat | None = None
    ) -> None:
        self.spec = spec
        self.quantised = quantised
        self.compute = DATA_TYPES[precision]

    def graph(self, name: str, description: str) -> Graph:
        """A new graph, whose weights are where this dialect wants them."""
        return Graph(name, description)

    def to_compute(self, graph: Graph, value: str) -> str:
        """fp32 to the precision of matrix products."""
        return value if self.compute == FLOAT else graph.cast(value, self.compute)

    def to_float(self, graph: Graph, value: str) -> str:
        """From the precision of matrix products to fp32."""
        return value if self.compute == FLOAT else graph.cast(value, FLOAT)

    def matrix(self, graph: Graph, name: str, ref: TensorRef) -> str:
        """A weight matrix in the precision of matrix products."""
        return graph.weight(name, ref)

    def linear(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """x @ W (+ b): x in compute precision, the result fp32."""
        matrix = f"{name}.weight"
        if matrix + PACKED in weights:
            y = self.quantised_product(graph, x, weights, matrix, len(self.token_axes))
        else:
            product = graph.op("MatMul", x, self.matrix(graph, matrix, weights[matrix]))
            y = self.to_float(graph, product)
        if f"{name}.bias" not in weights:
            return y
        biased: str = graph.op("Add", y, graph.weight(f"{name}.bias", weights[f"{name}.bias"]))
        return biased

    def quantised_product(
        self, graph: Graph, x: str, weights: Weights, name: str, axes: int
    ) -> str:
        """x @ W of a quantised matrix: x in compute precision, product and result fp32.

        Args:
            graph: Where the product is.
            x: What is multiplied.
            weights: Among which the matrix is.
            name: Of the matrix.
            axes: Of x before its features.
        """
        form = self.quantised
        assert form is not None
        x = self.to_float(graph, x)
        if form.is_float:
            return self._float8_product(graph, x, weights, name)
        ends = (PACKED, SCALES, ZERO_POINTS) if form.zero_points else (PACKED, SCALES)
        outputs, groups, _ = weights[name + PACKED].dims
        inputs = form.inputs_of(groups)
        if name + ORDER in weights:
            order = graph.weight(name + ORDER, weights[name + ORDER])
            x = graph.op("Gather", x, order, axis=-1)
        if form.offsets:
            x = self._with_sums(graph, x, inputs // form.group_size, axes)
        product: str = graph.op(
            OPERATOR,
            x,
            *(graph.weight(name + end, weights[name + end]) for end in ends),
            domain=MICROSOFT,
            K=form.rows(inputs),
            N=outputs,
            bits=form.bits,
            block_size=form.group_size,
            accuracy_level=self.accuracy_level,
        )
        return product

    def _with_sums(self, graph: Graph, x: str, groups: int, axes: int) -> str:
        """Features, the sums of their groups, and a sixteenth of these: see `bundle.offsets`."""
        by_group = graph.reshape(x, *[0] * axes, groups, -1)
        axis = graph.constant([axes + 1], np.int64)
        sums = graph.op("ReduceSum", by_group, axis, keepdims=0)
        second = graph.op("Mul", sums, graph.constant(1 / BASE, np.float32))
        return str(graph.op("Concat", x, sums, second, axis=axes))

    def _float8_product(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """The same of 8-bit floats, which opset 17 has no type for: each is looked up."""
        codes, scales = (graph.weight(name + end, weights[name + end]) for end in (PACKED, SCALES))
        outputs, _, _ = weights[name + PACKED].dims
        numbers = graph.op("Gather", graph.constant(E4M3, np.float32), graph.cast(codes, INT32))
        scales = graph.op("Unsqueeze", scales, graph.constant([-1], np.int64))
        matrix = graph.reshape(graph.op("Mul", numbers, scales), outputs, -1)
        return str(graph.op("MatMul", x, graph.op("Transpose", matrix, perm=[1, 0])))

    def widened(self, graph: Graph, y: str) -> str:
        """What `linear` gave, in fp32."""
        return y

    def residual(self, graph: Graph, x: str, y: str) -> str:
        """The sum of hidden states x, fp32, and y, which `linear` gave; in fp32."""
        total: str = graph.op("Add", x, self.widened(graph, y))
        return total

    def add_normed(self, graph: Graph, x: str, y: str, weights: Weights, name: str) -> str:
        """The sum of hidden states x, fp32, and the norm of y, which `linear` gave; in fp32."""
        normed = self.float_norm(graph, self.widened(graph, y), weights, name)
        return str(graph.op("Add", x, normed))

    def vocabulary(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """The product x @ W^T, W [V, features]: x in compute precision, the result fp32."""
        if name + PACKED in weights:
            return self.quantised_product(graph, x, weights, name, 1)
        weight = self.matrix(graph, name, weights[name])
        return self.to_float(graph, graph.op("Gemm", x, weight, transB=1))

    def softcapped(self, graph: Graph, x: str, cap: float | None) -> str:
        """tanh(x / cap) * cap of fp32 values, which stays within the cap; x where there is none."""
        if cap is None:
            return x
        limit = graph.constant(cap, np.float32)
        return str(graph.op("Mul", graph.op("Tanh", graph.op("Div", x, limit)), limit))

    def norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """RMSNorm or LayerNorm over the last axis of fp32 values, in fp32.

        Returns:
            The result in compute precision.
        """
        return self.to_compute(graph, self.float_norm(graph, x, weights, name))

    def float_norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """What `norm` gives before it is rounded, in fp32."""
        if self.spec.norm == "layer":
            weight = graph.weight(f"{name}.weight", weights[f"{name}.weight"])
            bias = graph.weight(f"{name}.bias", weights[f"{name}.bias"])
            normed: str = graph.op(
                "LayerNormalization", x, weight, bias, axis=-1, epsilon=self.spec.norm_epsilon
            )
        else:
            normed = self.root_norm(graph, x, weights, name)
        return normed

    def root_norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """RMSNorm over the last axis, in the precision of what `linear` gave."""
        weight = graph.weight(f"{name}.weight", weights[f"{name}.weight"])
        return str(graph.op("Mul", self._root_mean_square(graph, x), weight))

    def add_and_norm(
        self, graph: Graph, x: str, y: str, weights: Weights, name: str
    ) -> tuple[str, str]:
        """The sum of `residual`, fp32, and its norm, in compute precision."""
        total = self.residual(graph, x, y)
        return total, self.norm(graph, total, weights, name)

    def plain_norm(self, graph: Graph, x: str) -> str:
        """The model's kind of norm without weights, of fp32 values, in fp32."""
        if self.spec.norm == "layer":
            x = graph.op("Sub", x, graph.op("ReduceMean", x, axes=[-1], keepdims=1))
        return self._root_mean_square(graph, x)

    def unit_norm(self, graph: Graph, x: str, width: int) -> str:
        """RMSNorm without a weight, of fp32 values [..., width]; in compute precision."""
        return self.to_compute(graph, self._root_mean_square(graph, x))

    def inner(self, graph: Graph, up: str) -> str:
        """The MLP between its matrices: activated, gated where the model is.

        Args:
            graph: The block's graph.
            up: What `linear` gave; gate and up side by side where gated.

        Returns:
            [..., intermediate_size] in compute precision.
        """
        return self.to_compute(graph, self.activated(graph, up, self.spec.intermediate_size))

    def activated(self, graph: Graph, up: str, width: int) -> str:
        """What `inner` gives, of a width, in the precision that comes in."""
        spec = self.spec
        if not spec.gated:
            return self.activation(graph, up, spec.activation)
        sizes = graph.constant([width] * 2, np.int64)
        gate, up = graph.op("Split", up, sizes, axis=-1, outputs=2)
        return str(graph.op("Mul", self.activation(graph, gate, spec.activation), up))

    def _root_mean_square(self, graph: Graph, x: str) -> str:
        mean = graph.op("ReduceMean", graph.op("Mul", x, x), axes=[-1], keepdims=1)
        epsilon = graph.constant(self.spec.norm_epsilon, np.float32)
        normed: str = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, epsilon)))
        return normed

    def activation(self, graph: Graph, x: str, kind: Activation) -> str:
        """An activation function of what `linear` gave."""
        if kind == "relu":
            result = graph.op("Relu", x)
        elif kind == "silu":
            result = graph.op("Mul", x, graph.op("Sigmoid", x))
        else:
            inner = self._gelu_tanh(graph, x) if kind == "gelu_tanh" else self._gelu_erf(graph, x)
            half = graph.op("Mul", x, graph.constant(0.5, np.float32))
            result = graph.op("Mul", half, graph.op("Add", inner, graph.constant(1, np.float32)))
        return str(result)

    def _gelu_tanh(self, graph: Graph, x: str) -> str:
        cube = graph.op("Mul", graph.op("Mul", x, x), x)
        cubic = graph.op("Mul", cube, graph.constant(0.044715, np.float32))
        root = graph.constant(math.sqrt(2 / math.pi), np.float32)
        return str(graph.op("Tanh", graph.op("Mul", graph.op("Add", x, cubic), root)))

    def _gelu_erf(self, graph: Graph, x: str) -> str:
        scaled = graph.op("Mul", x, graph.constant(1 / math.sqrt(2), np.float32))
        return str(graph.op("Erf", scaled))

    def attention_inputs(self, graph: Graph) -> None:
        """Declares what attention needs besides the hidden states."""
        spec = self.spec
        cache: tuple[Dim, ...] = ("batch", spec.kv_heads, "past", spec.head_dim)
        graph.input("positions", INT32, "batch", "tokens")
        for name in spec.rotations:
            graph.input(f"rotary_{name}", FLOAT, "batch", "tokens", spec.rotary_dim // 2)
        graph.input("past_key", self.compute, *cache)
        graph.input("past_value", self.compute, *cache)

    def attention(self, graph: Graph, qkv: str, block: int, weights: Weights) -> str:
        """Attention over the cache and the new tokens; declares the new rows as outputs.

        Args:
            graph: The block's graph.
            qkv: [batch, tokens, (heads + 2 kv_heads) head_dim], what `linear` gave.
            block: Which block this is.
            weights: The block's, of which the norms of queries and keys are part.

        Returns:
            [batch, tokens, heads * head_dim] in compute precision.
        """
        spec = self.spec
        q, new_key, new_value = self._heads(graph, qkv, block, weights)
        rows: tuple[Dim, ...] = ("batch", spec.kv_heads, "tokens", spec.head_dim)
        new_key = graph.output(new_key, "key", self.compute, *rows)
        new_value = graph.output(new_value, "value", self.compute, *rows)
        key = graph.op("Concat", "past_key", new_key, axis=2)
        value = graph.op("Concat", "past_value", new_value, axis=2)
        # Heads that share a key are one more dimension of the query: no key is repeated.
        group = spec.heads // spec.kv_heads
        q = graph.op("Mul", q, graph.constant(spec.attention_scales[block], np.float32))
        q = self.to_compute(graph, graph.reshape(q, 0, spec.kv_heads, group, -1, spec.head_dim))
        axis = graph.constant([2], np.int64)
        key_transposed = graph.op("Transpose", key, perm=[0, 1, 3, 2])
        scores = graph.op("MatMul", q, graph.op("Unsqueeze", key_transposed, axis))
        scores = self.softcapped(graph, self.to_float(graph, scores), spec.attention_softcap)
        scores = graph.op("Add", scores, self._mask(graph, block))
        shares = self.to_compute(graph, graph.op("Softmax", scores, axis=-1))
        mixed = graph.op("MatMul", shares, graph.op("Unsqueeze", value, axis))
        mixed = graph.reshape(mixed, 0, spec.heads, -1, spec.head_dim)
        mixed = graph.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.reshape(mixed, 0, 0, spec.heads * spec.head_dim)

    def normed_parts(self, graph: Graph, qkv: str, weights: Weights) -> tuple[str, str, str]:
        """Queries and keys, normed, and values, each [batch, tokens, features]."""
        spec = self.spec
        axis, at, parts = graph.constant([2], np.int64), 0, []
        for heads in (spec.heads, spec.kv_heads, spec.kv_heads):
            ends = (at, at + heads * spec.head_dim)
            bounds = (graph.constant([each], np.int64) for each in ends)
            parts.append(str(graph.op("Slice", qkv, *bounds, axis)))
            at = ends[1]
        q, k, v = parts
        q = self.normed_part(graph, q, spec.heads, weights, "attention.q_norm")
        k = self.normed_part(graph, k, spec.kv_heads, weights, "attention.k_norm")
        return q, k, v

    def normed_part(self, graph: Graph, x: str, heads: int, weights: Weights, name: str) -> str:
        """Queries or keys [batch, tokens, features], normed as the model's are, if they are."""
        if self.spec.qk_norm == "none":
            return x
        if self.spec.qk_norm == "projection":
            return self.root_norm(graph, x, weights, name)
        by_head = graph.reshape(x, 0, 0, heads, self.spec.head_dim)
        normed = self.root_norm(graph, by_head, weights, name)
        return graph.reshape(normed, 0, 0, heads * self.spec.head_dim)

    def _heads(self, graph: Graph, qkv: str, block: int, weights: Weights) -> tuple[str, str, str]:
        """Splits into rotated q (fp32), rotated k and v (compute precision), heads first."""
        spec = self.spec
        if spec.qk_norm != "none":
            parts = self.normed_parts(graph, qkv, weights)
            q, k, v = (
                graph.op(
                    "Transpose", graph.reshape(part, 0, 0, -1, spec.head_dim), perm=[0, 2, 1, 3]
                )
                for part in parts
            )
        else:
            sizes = graph.constant([spec.heads, spec.kv_heads, spec.kv_heads], np.int64)
            heads = graph.reshape(qkv, 0, 0, spec.heads + 2 * spec.kv_heads, spec.head_dim)
            heads = graph.op("Transpose", heads, perm=[0, 2, 1, 3])
            q, k, v = graph.op("Split", heads, sizes, axis=1, outputs=3)
        if spec.rotary_dim_of(block):
            axis = graph.constant([1], np.int64)
            cos, sin = (
                graph.op("Unsqueeze", f"rotary_{name}", axis) for name in spec.rotations_of(block)
            )
            q, k = (self._rotate(graph, x, cos, sin) for x in (q, k))
        return q, self.to_compute(graph, k), self.to_compute(graph, v)

    def _rotate(self, graph: Graph, x: str, cos: str, sin: str) -> str:
        """Rotates feature i with feature i + rotary_dim/2, as transformers lays them out."""
        spec = self.spec
        half, rest = spec.rotary_dim // 2, spec.head_dim - spec.rotary_dim
        sizes = graph.constant([half, half, rest] if rest else [half, half], np.int64)
        first, second, *unrotated = graph.op("Split", x, sizes, axis=-1, outputs=3 if rest else 2)
        left = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
        right = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
        return str(graph.op("Concat", left, right, *unrotated, axis=-1))

    def _mask(self, graph: Graph, block: int) -> str:
        """[batch, 1, 1, tokens, past + tokens]: 0 where a query sees a key, else MASKED.

        Cache row j is position j; rows at or after a sequence's first new position are not its
        own yet (sequences of a batch may have different lengths) and are masked.
        """
        zero, one = graph.constant([0], np.int64), graph.constant([1], np.int64)
        past = graph.op("Shape", "past_key", start=2, end=3)
        index = graph.op(
            "Range",
            graph.constant(0, np.int64),
            graph.op("Squeeze", past),
            graph.constant(1, np.int64),
        )
        index = graph.op("Unsqueeze", graph.cast(index, INT32), zero)
        first = graph.op("Slice", "positions", zero, one, one)
        # A row that is not the sequence's own is moved to a position that no query reaches.
        beyond = graph.constant(2**30, np.int32)
        in_cache = graph.op("Where", graph.op("Less", index, first), index, beyond)
        keys = graph.op("Unsqueeze", graph.op("Concat", in_cache, "positions", axis=1), one)
        queries = graph.op("Unsqueeze", "positions", graph.constant([2], np.int64))
        visible = graph.op("LessOrEqual", keys, queries)
        if (window := self.spec.window_of(block)) is not None:
            oldest = graph.op("Sub", queries, graph.constant(window, np.int32))
            visible = graph.op("And", visible, graph.op("Greater", keys, oldest))
        mask = graph.op(
            "Where", visible, graph.constant(0, np.float32), graph.constant(MASKED, np.float32)
        )
        return str(graph.op("Unsqueeze", mask, graph.constant([1, 2], np.int64)))
