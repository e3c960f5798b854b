"""Exit heads that run a jump of their own, then the model's own head; check heads, its rows."""

from __future__ import annotations

import numpy as np

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.tensorrt.heads import HEAD_ROWS, ByLogits, FinalHead
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS, Norm
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.backends.tensorrt.weights import ROW_BYTES
from ojfa_export.bundle.names import CHECK_HEAD

ROW_ELEMENTS = ROW_BYTES // 4  # of fp32, as a kernel loads them


def final_head_of(model: OpenedModel, graph: str) -> FinalHead:
    """What follows a jump: the model's own head, or of a check head its rows."""
    return FinalHead(model, graph if graph == CHECK_HEAD else "final_head")


class ResidualExitHead(ByLogits):
    """One exit's residual shortcut, then the model's own head: y = h + (h P + b) (gate U).

    What the jump adds to reading the head is little.

    Args:
        model: The opened model.
        graph: Of the exit head, or of the check head.
        blocks_run: The exit, which picks the gate.
    """

    def __init__(self, model: OpenedModel, graph: str, blocks_run: int) -> None:
        self._final = final_head_of(model, graph)
        self.chooser = self._final.chooser
        store, plan = model.store, model.plan(graph)
        project, up, gates = (store.read(plan.weights[n]) for n in ("project", "up", "gates"))
        bias = store.read(plan.weights["project.bias"])
        rank = -(-len(up) // ROW_ELEMENTS) * ROW_ELEMENTS  # filled up with zeros
        self._project = store.filled(project.T, (rank, project.shape[0]))
        self._bias = store.filled(bias, (rank,))
        self._up = store.filled(gates[blocks_run - 1] * up.T, (up.shape[1], rank))
        self._kernels = model.linear("fp32")
        self._gemm = model.gemm("fp32")
        self._z = model.arrays.lasting((HEAD_ROWS, rank), np.float32)
        self._y = model.arrays.lasting((HEAD_ROWS, up.shape[1]), np.float32)

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`; at most HEAD_ROWS rows."""
        y = self._y[: len(hidden)]
        if len(hidden) > MOST_TOKENS and self._gemm is not None:
            self._jump(self._gemm, y, hidden)
        else:
            for at in range(0, len(hidden), MOST_TOKENS):
                rows = slice(at, at + MOST_TOKENS)
                self._jump(self._kernels, y[rows], hidden[rows])
        self._final.run(y, logits)

    def _jump(self, products: Products, y: DeviceArray, hidden: DeviceArray) -> None:
        z = self._z[: len(hidden)]
        products.linear(z, None, hidden, self._project, self._bias)
        products.linear(y, hidden, z, self._up, None)


class MlpExitHead(ByLogits):
    """One exit's MLP shortcut, then the model's own head: y = h + act(norm(h) up + bias) down.

    The kernels of a block's MLP run it: the exit's scale is the norm's weight, and its shift the
    bias of the first product.

    Args:
        model: The opened model.
        graph: Of the exit head, or of the check head.
        blocks_run: The exit, which picks scale and bias.
    """

    def __init__(self, model: OpenedModel, graph: str, blocks_run: int) -> None:
        self._model, self._final = model, final_head_of(model, graph)
        self.chooser = self._final.chooser
        store, plan, weights = model.store, model.plan(graph), model.weights(graph)
        scale, bias = (
            store.read(plan.weights[name])[blocks_run - 1] for name in ("exit.scale", "exit.bias")
        )
        self._norm = Norm(store.filled(scale, scale.shape), None, model.spec.norm_epsilon)
        self._bias = store.filled(bias, bias.shape)
        self._up, self._down = weights["mlp.up.weight"], weights["mlp.down.weight"]
        hidden, width = self._down.shape
        self._inner = model.arrays.lasting((HEAD_ROWS, width), DTYPES[model.precision])
        self._y = model.arrays.lasting((HEAD_ROWS, hidden), np.float32)

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`; at most HEAD_ROWS rows."""
        y, products = self._y[: len(hidden)], self._model.products(len(hidden))
        if products is not None:
            self._jump(products, y, hidden)
        else:  # TensorRT's engines run the blocks; of the jump there is none
            few = self._model.linear(self._model.precision)
            for at in range(0, len(hidden), MOST_TOKENS):
                rows = slice(at, at + MOST_TOKENS)
                self._jump(few, y[rows], hidden[rows])
        self._final.run(y, logits)

    def _jump(self, products: Products, y: DeviceArray, hidden: DeviceArray) -> None:
        inner = self._inner[: len(hidden)]
        products.norm_up(inner, hidden, self._norm, self._up, self._bias)
        products.linear(y, hidden, inner, self._down, None)
