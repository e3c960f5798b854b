"""Weights of 8-bit floats with scales, as transformers, DeepSeek and FBGEMM write them.

    weight            [outputs, inputs] float8_e4m3fn
    weight_scale_inv  [outputs / block, inputs / block] of blocks, mostly 128 x 128, the last ones
                      cut off; or weight_scale: one number, or [outputs, 1]

Either is what the numbers are multiplied with; "inverse" is meant of what quantised them. What
rounds activations beside them (activation_scheme) is not taken over.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.models.checkpoint.quantised.kept import Scaled
from ojfa_export.models.checkpoint.quantised.layout import MatrixTensors, refuse_unknown
from ojfa_export.models.families.config import Config

FP8 = ("F8_E4M3",)
SCALES = ("weight_scale_inv", "weight_scale")
_HARMLESS = "activation_scale_ub activation_scheme dequantize ignored_layers "
_HARMLESS += "modules_to_convert modules_to_not_convert"


@dataclass(frozen=True)
class Fp8:
    """See the module.

    Attributes:
        block: Weights of a block, outputs and inputs; None where scales are of rows or of all.
    """

    block: tuple[int, int] | None
    name: str = "fp8"

    def holds(self, module: str, names: Container[str]) -> bool:
        """See `Layout.holds`."""
        return any(f"{module}.{end}" in names for end in SCALES)

    def read(self, tensors: MatrixTensors, inputs: int, outputs: int) -> Scaled:
        """See `Layout.read`."""
        end = next(each for each in SCALES if each in tensors)
        return read_scaled(tensors, end, inputs, outputs, self.block)


def read_scaled(
    tensors: MatrixTensors, end: str, inputs: int, outputs: int, block: tuple[int, int] | None
) -> Scaled:
    """A matrix of 8-bit floats.

    Args:
        tensors: Of the layer.
        end: Name of its scales.
        inputs: Features that it multiplies.
        outputs: Features that come out.
        block: Weights of a block; None where scales are of rows or of all.

    Raises:
        CheckpointError: Other shapes or dtypes, or scales with NaN; numbers are read later.
    """
    tensors.check("weight", (outputs, inputs), FP8)
    shape, _ = tensors.header(end)
    if block is not None:
        wanted: tuple[int, ...] = (-(-outputs // block[0]), -(-inputs // block[1]))
        scales = tensors.scales(end, wanted)
    elif shape in ((), (1,), (1, 1)):
        scales, block = tensors.scales(end, shape).reshape(1, 1), (outputs, inputs)
    else:
        wanted = (outputs,) if len(shape) == 1 else (outputs, 1)
        scales, block = tensors.scales(end, wanted).reshape(-1, 1), (1, inputs)
    return Scaled(scales, block, (outputs, inputs), lambda: _numbers(tensors))


def _numbers(tensors: MatrixTensors) -> NDArray[Any]:
    """The numbers, of which none is NaN.

    Raises:
        CheckpointError: One is.
    """
    numbers = tensors.raw("weight")
    if (numbers.view(np.uint8) & 127 == 127).any():
        raise tensors.damaged("weight", "NaN")
    return numbers


def read_fp8(section: Config) -> Fp8:
    """Reads the quantization_config of an fp8 checkpoint.

    Raises:
        CheckpointError: A format that is not read.
    """
    for name in ("fmt", "weight_format"):
        section.require(name, "e4m3", "float8_e4m3fn")
    section.require("scale_fmt", "float", "ue8m0")
    block = section.get("weight_block_size")
    refuse_unknown(section, _HARMLESS)
    return Fp8(None if block is None else block_of(section, "weight_block_size", block))


def block_of(section: Config, name: str, value: Any) -> tuple[int, int]:
    """Two positive numbers.

    Raises:
        CheckpointError: It is something else.
    """
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(each) is int and each > 0 for each in sizes):
        raise section.wrong(name, "a list of two positive integers", value)
    return sizes[0], sizes[1]
