"""One product by itself: fp32, and quantised weights at both of MatMulNBits' accuracy levels.

python -m bench.cpu.products --shapes 576x1536 2048x8192 --tokens 1 64
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.bundle.weight_format import Quantised, WeightFormat

# What is raced: numbers and accuracy level; None is fp32.
KINDS: tuple[tuple[Quantised, int] | None, ...] = (
    None,
    ("int8", 1),
    ("int8", 4),
    ("int4", 1),
    ("int4", 4),
)


def main() -> None:
    """Times products on one thread, in turns, and prints medians in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x8192"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for shape in arguments.shapes:
        columns, outputs = map(int, shape.split("x"))
        weight = rng.normal(size=(columns, outputs)).astype(np.float32)
        sessions = {kind: session(weight, kind) for kind in KINDS}
        for tokens in arguments.tokens:
            x = rng.normal(size=(tokens, columns)).astype(np.float32)
            times: dict[Any, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(arguments.rounds):
                for kind, each in sessions.items():
                    each.run(None, {"x": x})  # brings the weights back into the caches
                    begin = time.perf_counter()
                    each.run(None, {"x": x})
                    times[kind].append(1e6 * (time.perf_counter() - begin))
            medians = {kind or "fp32": round(float(np.median(times[kind]))) for kind in KINDS}
            print(shape, f"{tokens} tokens:", medians, flush=True)


def session(weight: np.ndarray[Any, Any], kind: tuple[Quantised, int] | None) -> Any:
    """A session of one product x @ weight, with a thread of its own."""
    columns, outputs = weight.shape
    if kind is None:
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weights = {"w": weight}
    else:
        form = WeightFormat(storage=kind[0], group_size=32, zero_points=True)
        attributes = {"K": columns, "N": outputs, "bits": form.bits, "block_size": 32}
        node = helper.make_node(
            "MatMulNBits",
            ["x", "packed", "scales", "zero_points"],
            ["y"],
            domain="com.microsoft",
            accuracy_level=kind[1],
            **attributes,
        )
        weights = quantise(weight, form)._asdict()
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])
        for name, width in (("x", columns), ("y", outputs))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    main()
