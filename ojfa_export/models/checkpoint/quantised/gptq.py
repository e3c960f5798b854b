"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

    qweight  [inputs * bits / 32, outputs] int32: an output's numbers down the column
    scales   [groups, outputs]
    qzeros   [groups, outputs * bits / 32] int32: zero points along the row
    g_idx    [inputs]: each input's group, where they were quantised in another order

In format v1, the usual one, zero points are stored less one. They are read as GPTQModel does, which
adds 1 at each number's place to the word as a whole, so that a zero point of 0, which borrowed from
its neighbour, comes back as well; of 3 bits, which no word holds whole, to each by itself.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.models.checkpoint.quantised.bits import WORD, unpack
from ojfa_export.models.checkpoint.quantised.kept import Kept, groups_in_order
from ojfa_export.models.checkpoint.quantised.layout import (
    WORDS,
    MatrixTensors,
    check_group_size,
    refuse_unknown,
)
from ojfa_export.models.families.config import Config

BITS = (2, 3, 4, 8)
_HARMLESS = (
    "act_group_aware backend batch_size block_name_to_quantize cache_block_outputs "
    "damp_auto_increment damp_percent dataset desc_act disable_exllama exllama_config hyb_act "
    "lm_head max_input_length meta mock_quantization model_file_base_name model_name_or_path "
    "model_seqlen module_name_preceding_first_block modules_in_block_to_quantize "
    "modules_to_not_convert mse offload_to_disk pad_token_id quantizer static_groups sym tokenizer "
    "true_sequential use_cuda_fp16 use_exllama version"
)


@dataclass(frozen=True)
class Gptq:
    """See the module.

    Attributes:
        bits: Of a number; None where they differ between layers, and shapes say.
        group_size: Inputs of a group, -1 for all; None where they differ.
        first_format: Whether zero points are stored less one.
    """

    bits: int | None
    group_size: int | None
    first_format: bool
    name: str = "gptq"

    def holds(self, module: str, names: Container[str]) -> bool:
        """See `Layout.holds`."""
        return f"{module}.qweight" in names

    def read(self, tensors: MatrixTensors, inputs: int, outputs: int) -> Kept:
        """See `Layout.read`."""
        tensors.check("qweight", None, WORDS)
        stored, _ = tensors.header("qweight")
        bits = self.bits or (stored[0] * WORD // inputs if stored else 0)
        if bits not in BITS:
            raise tensors.wrong("qweight", f"has shape {list(stored)} for {inputs} inputs")
        if inputs * bits % WORD or outputs * bits % WORD:
            raise tensors.wrong(
                "qweight", f"can't hold {outputs} x {inputs} numbers of {bits} bits"
            )
        tensors.check("qweight", (inputs * bits // WORD, outputs), WORDS)
        groups = self._groups(tensors, inputs)
        scales = tensors.scales("scales", (groups, outputs))
        words = tensors.whole("qzeros", (groups, outputs * bits // WORD)).astype(np.int32)
        points = self._points(words, bits, outputs)
        return Kept(
            bits=bits,
            scales=np.ascontiguousarray(scales.T),
            zero_points=np.ascontiguousarray(points.T),
            group_of=self._group_of(tensors, inputs, groups),
            numbers=lambda: unpack(tensors.raw("qweight").T, bits, inputs),
        )

    def _points(self, words: NDArray[np.int32], bits: int, outputs: int) -> NDArray[np.uint8]:
        """Zero points [groups, outputs]."""
        if not self.first_format:
            return unpack(words, bits, outputs)
        if WORD % bits:  # numbers that reach into the next word are added to by themselves
            return unpack(words, bits, outputs) + np.uint8(1) & np.uint8((1 << bits) - 1)
        one = sum(1 << place for place in range(0, WORD, bits))
        return unpack((words.view(np.uint32) + np.uint32(one)).view(np.int32), bits, outputs)

    def _groups(self, tensors: MatrixTensors, inputs: int) -> int:
        if self.group_size is None:
            shape, _ = tensors.header("scales")
            return inputs // tensors.group_size(inputs, shape[0] if shape else 0, "scales")
        if self.group_size == -1:
            return 1
        if inputs % self.group_size:
            raise tensors.wrong(
                "qweight", f"has {inputs} inputs, no multiple of the group size {self.group_size}"
            )
        return inputs // self.group_size

    def _group_of(self, tensors: MatrixTensors, inputs: int, groups: int) -> NDArray[np.int32]:
        if "g_idx" not in tensors:
            return groups_in_order(inputs, inputs // groups)
        group_of: NDArray[np.int32] = tensors.whole("g_idx", (inputs,)).astype(np.int32)
        if group_of.min() < 0 or group_of.max() >= groups:
            raise tensors.wrong("g_idx", f"names a group outside 0..{groups - 1}")
        return group_of


def read_gptq(section: Config) -> Gptq:
    """Reads the quantization_config of a GPTQ checkpoint.

    Raises:
        CheckpointError: A format, or numbers, that are not read.
    """
    section.require("bits", *BITS)
    section.require("pack_dtype", "int32")
    stored = "checkpoint_format" if "checkpoint_format" in section.fields else "format"
    for name in ("checkpoint_format", "format"):
        section.require(name, "gptq", "gptq_v2")
    section.require("is_marlin_format", False)
    dynamic = bool(section.get("dynamic"))
    bits, size = section.integer("bits"), check_group_size(section, -1)
    form = section.get(stored, "gptq")
    refuse_unknown(section, _HARMLESS)
    return Gptq(
        bits=None if dynamic else bits,
        group_size=None if dynamic else size,
        first_format=form == "gptq",
    )
