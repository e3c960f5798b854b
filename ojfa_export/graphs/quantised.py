"""Quantised matrices in weight files and graphs.

They are made by a backend's library (`backends.quantised`), one matrix at a time. Those of whole
numbers are run by the contrib operator MatMulNBits, which reads numbers, scales and zero points as
they lie in the file; of floats, which it doesn't know, the graph looks up what each code stands
for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ojfa_export.bundle.weight_format import (
    ORDER,
    PACKED,
    SCALES,
    ZERO_POINTS,
    QuantisedMatrix,
    WeightFormat,
)
from ojfa_export.graphs import gptq
from ojfa_export.graphs.input_factor import InputFactor
from ojfa_export.graphs.weights import CONVERSION_CHUNK, TensorRef, WeightFile

OPERATOR = "MatMulNBits"


@dataclass(frozen=True)
class Quantiser:
    """Makes quantised matrices.

    Attributes:
        form: What it makes.
        quantise: Quantises columns [inputs, outputs] float32.
    """

    form: WeightFormat
    quantise: Callable[[NDArray[np.float32], WeightFormat], QuantisedMatrix]

    def takes(self, inputs: int) -> bool:
        """Whether so many features are whole groups."""
        return inputs % self.form.group_size == 0

    def make(self, matrix: NDArray[Any], factor: InputFactor | None = None) -> QuantisedMatrix:
        """Quantises a matrix [inputs, outputs].

        Args:
            matrix: The weights.
            factor: What is known of its inputs; None rounds each weight to the nearest number.
        """
        inputs, outputs = matrix.shape
        step = max(1, CONVERSION_CHUNK // inputs)
        parts = []
        for start in range(0, outputs, step):  # so that a large head is never held twice
            columns = np.ascontiguousarray(matrix[:, start : start + step], np.float32)
            if factor is None:
                parts.append(self.quantise(columns, self.form))
            else:
                parts.append(gptq.quantise(columns, self.form, factor))
        points = [part.zero_points for part in parts if part.zero_points is not None]
        return QuantisedMatrix(
            np.concatenate([part.packed for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(points) if points else None,
        )


def add_matrix(file: WeightFile, name: str, matrix: QuantisedMatrix) -> dict[str, TensorRef]:
    """Appends a quantised matrix to a file.

    Returns:
        Its tensors.
    """
    refs = {
        name + PACKED: file.add_bytes(matrix.packed),
        name + SCALES: file.add(name + SCALES, matrix.scales, "fp32"),
    }
    if matrix.zero_points is not None:
        refs[name + ZERO_POINTS] = file.add_bytes(matrix.zero_points)
    if matrix.order is not None:
        refs[name + ORDER] = file.add_integers(matrix.order)
    return refs


def format_of(model: onnx.ModelProto) -> WeightFormat | None:
    """What a graph's quantised matrices are stored as; None where it has none."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            values = {each.name: each.i for each in node.attribute}
            return WeightFormat(
                storage="int4" if values["bits"] == 4 else "int8",
                group_size=values["block_size"],
                zero_points=len(node.input) > 3,
                offsets=made_by.get(node.input[0]) == "Concat",  # with the sums of groups
            )
    for tensor in model.graph.initializer:  # no operator's: floats
        if tensor.name.endswith(PACKED):
            return WeightFormat(storage="fp8", group_size=tensor.dims[-1])
    return None
