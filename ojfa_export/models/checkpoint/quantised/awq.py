"""AWQ's layout "gemm", as AutoAWQ writes it.

    qweight  [inputs, outputs / 8] int32: eight outputs of an input
    scales   [groups, outputs]
    qzeros   [groups, outputs / 8] int32: alike

The nibbles of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.models.checkpoint.quantised.bits import unpack
from ojfa_export.models.checkpoint.quantised.kept import Kept, groups_in_order
from ojfa_export.models.checkpoint.quantised.layout import (
    WORDS,
    MatrixTensors,
    check_group_size,
    refuse_unknown,
)
from ojfa_export.models.families.config import Config

# Where in a word each of its eight outputs is.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
BITS = 4
_HARMLESS = "backend do_fuse exllama_config fuse_max_seq_len lm_head modules_to_fuse "
_HARMLESS += "modules_to_not_convert meta sym desc_act"


@dataclass(frozen=True)
class Awq:
    """See the module.

    Attributes:
        group_size: Inputs of a group, -1 for all.
    """

    group_size: int
    name: str = "awq"

    def holds(self, module: str, names: Container[str]) -> bool:
        """See `Layout.holds`."""
        return f"{module}.qweight" in names

    def read(self, tensors: MatrixTensors, inputs: int, outputs: int) -> Kept:
        """See `Layout.read`."""
        size = inputs if self.group_size == -1 else self.group_size
        tensors.check("qweight", (inputs, outputs // len(PLACES)), WORDS)
        if inputs % size:
            raise tensors.wrong(
                "qweight", f"has {inputs} inputs, no multiple of the group size {size}"
            )
        groups = inputs // size
        scales = tensors.scales("scales", (groups, outputs))
        points = tensors.whole("qzeros", (groups, outputs // len(PLACES)))
        return Kept(
            bits=BITS,
            scales=np.ascontiguousarray(scales.T),
            zero_points=_by_output(points),
            group_of=groups_in_order(inputs, size),
            numbers=lambda: _by_output(tensors.raw("qweight")),
        )


def _by_output(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Words [rows, outputs / 8] as numbers [outputs, rows]."""
    rows, width = words.shape
    apart = unpack(words, BITS, width * len(PLACES)).reshape(rows, width, len(PLACES))
    return np.ascontiguousarray(apart[:, :, PLACES].reshape(rows, -1).T)


def read_awq(section: Config) -> Awq:
    """Reads the quantization_config of an AWQ checkpoint.

    Raises:
        CheckpointError: A format, or numbers, that are not read.
    """
    for name in ("bits", "w_bit"):
        section.require(name, BITS)
    for name in ("version", "format", "checkpoint_format"):
        section.require(name, "gemm", "GEMM")
    section.require("zero_point", True)
    if "q_group_size" in section.fields:
        size = section.integer("q_group_size", least=-1)
    else:
        size = check_group_size(section, 128)
    refuse_unknown(section, _HARMLESS)
    return Awq(size)
