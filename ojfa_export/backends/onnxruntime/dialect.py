"""Blocks in ONNX Runtime's own operators: its fused attention writes the cache in place."""

from __future__ import annotations

from collections.abc import Callable

from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.graph import FLOAT, INT32, INT64, MICROSOFT, Graph
from ojfa_export.graphs.weights import TensorRef
from ojfa_export.models.spec import Activation, ModelSpec, NormKind

WIDENED_AT_ONCE = 64_000_000  # bytes
# Which input of GroupQueryAttention `query_seqlens` is (ONNX Runtime 1.32 and later).
QUERY_LENGTHS = 16
Parameter = Callable[[Graph, str, TensorRef], str]
SKIP_RMS_NORM = "SkipSimplifiedLayerNormalization"


def check_fused_attention(spec: ModelSpec, hint: str) -> None:
    """Refuses shapes that GroupQueryAttention doesn't take.

    Raises:
        BackendError: With this hint.
    """
    multiple = 16 if spec.rotary_dim else 8
    if spec.head_dim % multiple or spec.rotary_dim % 16:
        raise BackendError(
            f"head size {spec.head_dim} with {spec.rotary_dim} rotated features: ONNX Runtime's "
            f"fused attention needs multiples of {multiple}",
            hint=hint,
        )


class OnnxRuntimeDialect(Portable):
    """What ONNX Runtime's providers share of its contrib operators."""

    def vector(self, graph: Graph, name: str, ref: TensorRef) -> str:
        """A norm's weight or bias, in the precision that the norm's result has."""
        return graph.weight(name, ref)

    def norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """RMSNorm or LayerNorm as one node."""
        return self._norm(graph, x, weights, name, self.spec.norm, self.vector)

    def float_norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """The same in fp32."""
        return self._norm(graph, x, weights, name, self.spec.norm, _as_stored)

    def root_norm(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """RMSNorm as one node."""
        return self._norm(graph, x, weights, name, "rms", self.vector)

    def _norm(
        self,
        graph: Graph,
        x: str,
        weights: Weights,
        name: str,
        norm: NormKind,
        parameter: Parameter,
    ) -> str:
        layer = norm == "layer"
        names = [f"{name}.weight", f"{name}.bias"] if layer else [f"{name}.weight"]
        parameters = [parameter(graph, each, weights[each]) for each in names]
        kind = "LayerNormalization" if layer else "SimplifiedLayerNormalization"
        epsilon = self.spec.norm_epsilon
        return str(graph.op(kind, x, *parameters, axis=-1, epsilon=epsilon, stash_type=1))

    def add_and_norm(
        self, graph: Graph, x: str, y: str, weights: Weights, name: str
    ) -> tuple[str, str]:
        """The sum x + y, and its norm, as one node."""
        return self.skip_norm(graph, x, y, weights, name, self.spec.norm_epsilon)

    def skip_norm(
        self, graph: Graph, x: str, y: str, weights: Weights, name: str, epsilon: float
    ) -> tuple[str, str]:
        """The sum of fp32 values, and its norm in fp32, as one node."""
        kind = "SkipLayerNormalization" if self.spec.norm == "layer" else SKIP_RMS_NORM
        parameters = [
            graph.weight(each, weights[each])
            for each in (f"{name}.weight", f"{name}.bias")
            if each in weights
        ]
        normed, _, _, total = graph.op(
            kind,
            x,
            y,
            *parameters,
            outputs=4,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return total, normed

    def activation(self, graph: Graph, x: str, kind: Activation) -> str:
        """An activation as one node where there is one."""
        if kind == "silu":
            return str(graph.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0))
        if kind == "gelu_tanh":
            return str(graph.op("FastGelu", x, domain=MICROSOFT))
        if kind == "gelu":
            return str(graph.op("Gelu", x, domain=MICROSOFT))
        return super().activation(graph, x, kind)

    def attention_inputs(self, graph: Graph) -> None:
        """Cache buffers of full capacity, and how much of each is in use."""
        spec = self.spec
        graph.input("last_positions", INT32, "batch")
        graph.input("total_length", INT32)
        for name in spec.rotations:
            graph.input(f"rotary_{name}_table", self.compute, "rows", spec.rotary_dim // 2)
        for name in ("past_key", "past_value"):
            graph.input(name, self.compute, "batch", spec.kv_heads, "capacity", spec.head_dim)

    def attention(self, graph: Graph, qkv: str, block: int, weights: Weights) -> str:
        """GroupQueryAttention: rotates, appends to the cache, attends."""
        spec, rotates = self.spec, self.spec.rotary_dim_of(block) > 0
        parts = (qkv, "", "")
        if spec.qk_norm != "none":
            parts = self.normed_parts(graph, qkv, weights)
        window = spec.window_of(block)
        tables = [f"rotary_{name}_table" for name in spec.rotations_of(block)] if rotates else []
        lengths = self.ragged_inputs()
        if lengths:  # the last of the operator's inputs
            lengths = ("",) * (QUERY_LENGTHS - 7 - len(tables)) + lengths
        mixed, key, value = graph.op(
            "GroupQueryAttention",
            *parts,
            "past_key",
            "past_value",
            "last_positions",
            "total_length",
            *tables,
            *lengths,
            outputs=3,
            domain=MICROSOFT,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            scale=spec.attention_scales[block],
            do_rotary=int(rotates),
            local_window_size=-1 if window is None else window,
            **({} if spec.attention_softcap is None else {"softcap": spec.attention_softcap}),
        )
        self.cache_outputs(graph, key, value)
        return str(mixed)

    def ragged_inputs(self) -> tuple[str, ...]:
        """Further inputs of GroupQueryAttention where chunks of different lengths run together."""
        return ()

    def cache_outputs(self, graph: Graph, key: str, value: str) -> None:
        """Declares the cache with its new rows: the same memory as the inputs'."""
        spec = self.spec
        for result, name in ((key, "key"), (value, "value")):
            shape = ("batch", spec.kv_heads, "capacity", spec.head_dim)
            graph.output(result, name, self.compute, *shape)


class OnnxRuntimeCpu(OnnxRuntimeDialect):
    """For the CPU provider, in fp32.

    It has no matrix product in fp16 on x86 and none in bf16, so such weights are widened when a
    graph is loaded.

    Args:
        spec: The model.
        quantised: What quantised matrices are stored as, where there are some.
    """

    token_axes: tuple[str, ...] = ("tokens",)
    # Products with quantised matrices round what they multiply to 8 bits: for one token those that
    # don't take two to four times as long with int4, and tens of times with int8 (docs/weights.md).
    accuracy_level = 4

    def __init__(self, spec: ModelSpec, quantised: WeightFormat | None = None) -> None:
        super().__init__(spec, "fp32", quantised)

    def attention_inputs(self, graph: Graph) -> None:
        """Beside the cache, where each slot's tokens are among those of the pass."""
        super().attention_inputs(graph)
        graph.input("query_lengths", INT32, "batch")
        graph.input("unpack", INT64, "batch", "chunk")
        graph.input("pack", INT64, "tokens")

    def attention(self, graph: Graph, qkv: str, block: int, weights: Weights) -> str:
        """Attention of a ragged pass: tokens go to their slots' rows, padded, and back."""
        rows = graph.op("Gather", qkv, "unpack", axis=0)
        mixed = super().attention(graph, rows, block, weights)
        flat = graph.reshape(mixed, -1, self.spec.heads * self.spec.head_dim)
        return str(graph.op("Gather", flat, "pack", axis=0))

    def ragged_inputs(self) -> tuple[str, ...]:
        """Of GroupQueryAttention: how many of a slot's tokens are no padding."""
        return ("query_lengths",)

    def matrix(self, graph: Graph, name: str, ref: TensorRef) -> str:
        """A weight matrix, widened where it is stored in 16 bits."""
        weight = super().matrix(graph, name, ref)
        return graph.cast(weight, FLOAT) if ref.dtype != FLOAT else weight

    def vocabulary(self, graph: Graph, x: str, weights: Weights, name: str) -> str:
        """The product x @ W^T; a large matrix of 16 bits in parts.

        Loading holds a matrix three times at its peak: as stored, widened, and packed. In parts,
        only one part is held packed beside the widened whole.
        """
        ref = weights.get(name)
        if ref is None or ref.dtype == FLOAT:
            return super().vocabulary(graph, x, weights, name)
        rows = ref.dims[0]
        step = max(1, WIDENED_AT_ONCE // (4 * ref.dims[1]))
        if rows <= step:
            return super().vocabulary(graph, x, weights, name)
        parts = {
            f"{name}.{start}": ref.rows(start, min(start + step, rows))
            for start in range(0, rows, step)
        }
        products = [super(OnnxRuntimeCpu, self).vocabulary(graph, x, parts, each) for each in parts]
        return str(graph.op("Concat", *products, axis=1))


def _as_stored(graph: Graph, name: str, ref: TensorRef) -> str:
    return graph.weight(name, ref)
