"""Building an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ojfa_export.graphs.weights import TensorRef

OPSET = 17
# The IR version that came with opset 17; TensorRT 8.6's parser takes no later one.
IR_VERSION = 8
FLOAT, FLOAT16, INT32, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
)
MICROSOFT = "com.microsoft"

Dim = int | str


class Graph:
    """An ONNX graph under construction. Values are their names.

    Args:
        name: Name of the graph.
        description: What it computes, kept as its doc string.
        opset: Version of the standard operators.
    """

    def __init__(self, name: str, description: str, opset: int = OPSET) -> None:
        self.name = name
        self._opset = opset
        self.description = description
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._domains: set[str] = set()
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def input(self, name: str, dtype: int, *shape: Dim) -> str:
        """Declares an input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def has_input(self, name: str) -> bool:
        """Whether an input of this name was declared."""
        return any(each.name == name for each in self._inputs)

    def output(self, value: str, name: str, dtype: int, *shape: Dim) -> str:
        """Declares a node's result as an output; it is called by this name from here on."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if each == value else each for each in names]
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, ref: TensorRef) -> str:
        """Refers to a tensor in a weight file."""
        if name not in self._initializers:
            self._initializers[name] = ref.proto(name)
        return name

    def constant(self, value: float | int | Sequence[int] | NDArray[Any], dtype: Any) -> str:
        """A small constant held in the graph itself; equal constants are one."""
        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def op(
        self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Adds a node.

        Args:
            kind: Operator.
            inputs: Values; "" for an optional input that is left out.
            outputs: How many outputs the node has.
            domain: Operator domain.
            attributes: The node's attributes.

        Returns:
            The output's name, or a tuple of names where there are several.
        """
        index = len(self._nodes)
        names = [f"{kind}_{index}" if i == 0 else f"{kind}_{index}_{i}" for i in range(outputs)]
        node = helper.make_node(
            kind, list(inputs), names, name=f"{kind}_{index}", domain=domain, **attributes
        )
        self._nodes.append(node)
        self._domains.add(domain)
        return names[0] if outputs == 1 else tuple(names)

    def cast(self, value: str, dtype: int) -> str:
        """Converts a value to another dtype."""
        result: str = self.op("Cast", value, to=dtype)
        return result

    def reshape(self, value: str, *shape: int) -> str:
        """Reshapes; 0 keeps a dimension, -1 is inferred."""
        result: str = self.op("Reshape", value, self.constant(shape, np.int64))
        return result

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
            doc_string=self.description,
        )
        opsets = [helper.make_opsetid("", self._opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self._domains - {""})]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="ojfa-export")
        model.ir_version = IR_VERSION
        return model


class WeightInputs(Graph):
    """A graph whose weights are inputs, so that equal blocks are one graph."""

    def weight(self, name: str, ref: TensorRef) -> str:
        """Declares a weight as an input."""
        if not self.has_input(name):
            self.input(name, ref.dtype, *ref.dims)
        return name
