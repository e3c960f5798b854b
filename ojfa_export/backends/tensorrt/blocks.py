"""One block on the GPU: what goes on the stream for it, by kernels alone or with engines."""

from __future__ import annotations

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.tensorrt.after import add_normed
from ojfa_export.backends.tensorrt.attention import Operands
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.linear import Norm
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.plan import MLP, QKV
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.backends.tensorrt.qk_norm import norm_queries_and_keys
from ojfa_export.backends.tensorrt.workspace import Workspace
from ojfa_export.bundle.names import block_name
from ojfa_export.models.spec import SECOND


class Block:
    """A block and its keys and values.

    Args:
        model: The opened model.
        index: Which block.
        cache: Of the executor.
        like: Which block of the model its attention is that of; None for its own.
    """

    def __init__(
        self, model: OpenedModel, index: int, cache: KvCache, like: int | None = None
    ) -> None:
        self._model, self._index, self._cache = model, index, cache
        self._like = index if like is None else like
        self._name = block_name(index)
        self._keys = model.arrays.lasting(cache.shape, model.cache_dtype)
        self._values = model.arrays.lasting(cache.shape, model.cache_dtype)

    def unload(self) -> None:
        """Lets go of the weights."""
        self._model.close(self._name)

    def copy_page(self, source: int, target: int) -> None:
        """Copies a page of keys and values to another."""
        size = self._keys.nbytes // self._keys.shape[0]
        for array in (self._keys, self._values):
            start = array.pointer
            self._model.device.copy(start + source * size, start + target * size, size)

    def run(self, workspace: Workspace, long_context: bool) -> None:
        """Puts the block on the stream.

        Args:
            workspace: Holds the tokens' hidden states.
            long_context: Whether LongRoPE's long factors apply.
        """
        products = self._model.products(workspace.tokens)
        if products:
            self._qkv_by_kernels(workspace, products)
        else:
            self._qkv_by_engine(workspace)
        if self._model.spec.qk_norm != "none":
            self._norm_queries_and_keys(workspace)
        self._attend(workspace, long_context)
        if products:
            self._mlp_by_kernels(workspace, products)
        else:
            self._mlp_by_engine(workspace)

    def settle(self, tokens: int) -> None:
        """Runs the engines for nothing, so that TensorRT has these shapes before a recording.

        Where the shapes are others than at its last run it has things to do that can't be recorded.
        """
        workspace = Workspace(self._model, tokens)
        self._qkv_by_engine(workspace)
        self._mlp_by_engine(workspace)

    def _qkv_by_kernels(self, workspace: Workspace, products: Products) -> None:
        weights, source = self._model.weights(self._name), workspace.hidden[self._index % 2]
        products.norm_linear(
            workspace.qkv,
            source,
            self._norm("attention.norm"),
            weights["attention.qkv.weight"],
            weights.get("attention.qkv.bias"),
        )

    def _mlp_by_kernels(self, workspace: Workspace, products: Products) -> None:
        weights = self._model.weights(self._name)
        source = workspace.hidden[self._index % 2]
        target = workspace.hidden[1 - self._index % 2]
        out, up, down = "attention.out", "mlp.up", "mlp.down"
        self._add(products, workspace, (target, source, workspace.mixed), out)
        products.norm_up(
            workspace.inner,
            target,
            self._norm("mlp.norm"),
            weights[f"{up}.weight"],
            weights.get(f"{up}.bias"),
        )
        self._add(products, workspace, (target, target, workspace.inner), down)

    def _add(
        self,
        products: Products,
        workspace: Workspace,
        arrays: tuple[DeviceArray, DeviceArray, DeviceArray],
        name: str,
    ) -> None:
        """out = residual + the product with x, behind a norm where there is one."""
        out, residual, x = arrays
        weights = self._model.weights(self._name)
        matrix, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        if workspace.product is None:
            products.linear(out, residual, x, matrix, bias)
            return
        products.linear(workspace.product, None, x, matrix, bias)
        part = name.partition(".")[0]
        norm = self._norm(f"{part}.{self._model.spec.norm_name('after')}")
        kernels = self._model.kernels[self._model.precision]
        add_normed(kernels, out, residual, workspace.product, norm)

    def _qkv_by_engine(self, workspace: Workspace) -> None:
        self._run_engine(
            QKV,
            workspace.tokens,
            {
                "hidden": workspace.hidden[self._index % 2],
                "qkv": workspace.qkv,
            },
            ("attention.norm", "attention.qkv"),
        )

    def _norm_queries_and_keys(self, workspace: Workspace) -> None:
        model = self._model
        weights = model.weights(self._name)
        norm_queries_and_keys(
            model.kernels[model.precision],
            model.spec,
            workspace.tokens,
            workspace.qkv.pointer,
            weights["attention.q_norm.weight"].pointer,
            weights["attention.k_norm.weight"].pointer,
        )

    def _mlp_by_engine(self, workspace: Workspace) -> None:
        self._run_engine(
            MLP,
            workspace.tokens,
            {
                "hidden": workspace.hidden[self._index % 2],
                "mixed": workspace.mixed,
                "hidden_out": workspace.hidden[1 - self._index % 2],
            },
            ("attention.out", "attention.after_norm", "mlp."),
        )

    def _run_engine(
        self, part: str, tokens: int, arrays: dict[str, DeviceArray], prefixes: tuple[str, ...]
    ) -> None:
        results = ("qkv", "hidden_out")
        self._model.engine(self._name, part).run(
            tokens,
            {
                name: (array.pointer, 0 if name in results else array.shape[-1])
                for name, array in arrays.items()
            },
            {
                name: array.pointer
                for name, array in self._model.weights(self._name).items()
                if name.startswith(prefixes)
            },
        )

    def _norm(self, name: str) -> Norm:
        weights = self._model.weights(self._name)
        epsilon = self._model.spec.norm_epsilon
        return Norm(weights[f"{name}.weight"], weights.get(f"{name}.bias"), epsilon)

    def _attend(self, workspace: Workspace, long_context: bool) -> None:
        cosines, sines = self._rotations(long_context)
        cache, spec = self._cache, self._model.spec
        operands = Operands(
            out=workspace.mixed.pointer,
            qkv=workspace.qkv.pointer,
            keys=self._keys.pointer,
            values=self._values.pointer,
            cosines=cosines,
            sines=sines,
            positions=workspace.positions,
            sequences=workspace.sequences,
            table=cache.pages.pointer,
            most_pages=cache.pages.most,
            scale=spec.attention_scales[self._like],
            of_all=bool(spec.windowed) and spec.window_of(self._like) is None,
        )
        cache.attention.run(operands, cache.scratch, workspace.tokens, workspace.launches)

    def _rotations(self, long_context: bool) -> tuple[int, int]:
        tables, spec = self._model.rotary, self._model.spec
        if tables is None or not spec.rotary_dim_of(self._like):
            return 0, 0
        cosines, sines = tables
        long = long_context and spec.rotary_switch is not None
        second = long or spec.rotations_of(self._like) == SECOND
        skipped = cosines.nbytes // 2 if second else 0
        return cosines.pointer + skipped, sines.pointer + skipped
