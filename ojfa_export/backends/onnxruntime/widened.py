"""Graphs in bf16 as the CPU provider can run them: in fp32, rounded where they round to bf16."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper


def widen(model: onnx.ModelProto) -> bytes:
    """A graph without bf16 but in its weights, serialised; inputs and outputs become fp32.

    Weights are widened as they are used, and what is rounded to bf16 is widened right after. Only
    products, which bf16 rounds once more, keep what fp32 holds.

    Args:
        model: The graph; changed.
    """
    graph = model.graph
    narrow = {each.name for each in graph.initializer if each.data_type == TensorProto.BFLOAT16}
    nodes = [
        helper.make_node("Cast", [name], [_wide(name)], to=TensorProto.FLOAT)
        for name in sorted(narrow)
    ]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in narrow:
                node.input[index] = _wide(name)
        nodes += _rounding(node) if _to(node) == TensorProto.BFLOAT16 else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    return bytes(model.SerializeToString())


def _rounding(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """A cast to bf16 and back."""
    [result] = node.output
    yield helper.make_node("Cast", node.input, [_wide(result)], to=TensorProto.BFLOAT16)
    yield helper.make_node("Cast", [_wide(result)], [result], to=TensorProto.FLOAT)


def _to(node: onnx.NodeProto) -> int | None:
    """What a cast makes; None of other nodes."""
    kinds = (each.i for each in node.attribute if each.name == "to")
    return next(kinds, None) if node.op_type == "Cast" else None


def _wide(name: str) -> str:
    return f"{name}.widened"
