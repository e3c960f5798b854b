"""The layouts of compressed-tensors, as llm-compressor writes them.

    pack-quantized   weight_packed [outputs, words] int32, weight_shape [2]: numbers along the row
    int-quantized    weight [outputs, inputs] int8
    float-quantized  weight [outputs, inputs] float8_e4m3fn
    naive-quantized  either of the last two

with weight_scale of a tensor, [outputs, 1] of rows, [outputs, groups], or of blocks (fp8), and of
whole numbers weight_zero_point, where they are not symmetric: int8 like the scales or, in
pack-quantized, packed down the outputs. Numbers have a sign; here they have none, and zero points
are moved as far. weight_g_idx says each input's group where they were quantised in another order.

Which scheme a layer has is seen by its tensors, and must be one of config_groups. What rounds
activations (input_activations) is not taken over.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.quantised.bits import unpack, words_of
from ojfa_export.models.checkpoint.quantised.fp8 import FP8, block_of, read_scaled
from ojfa_export.models.checkpoint.quantised.kept import Kept, Scaled, groups_in_order
from ojfa_export.models.checkpoint.quantised.layout import (
    WORDS,
    MatrixTensors,
    check_group_size,
    refuse_unknown,
)
from ojfa_export.models.families.config import Config

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
STRATEGIES = ("tensor", "channel", "group", "block")
INT8 = ("I8", "int8")
PACKED, SCALE, POINTS, GROUP_OF = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
)
_OF_WEIGHTS = "actorder dynamic observer observer_kwargs scale_dtype zp_dtype"


@dataclass(frozen=True)
class Scheme:
    """How the weights of some layers are quantised.

    Attributes:
        bits: Of a number.
        is_float: Whether numbers are 8-bit floats.
        symmetric: Whether all zero points are 0.
        strategy: What a scale is of.
        group_size: Inputs of a group, where scales are of groups.
        block: Weights of a block, outputs and inputs, where they are of blocks.
    """

    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None

    def scale_shape(self, inputs: int, outputs: int) -> tuple[int, ...]:
        """What `weight_scale` of such a layer is like; one of a tensor counts as one of rows."""
        if self.group_size is not None:
            return (outputs, -(-inputs // self.group_size))
        if self.block is not None:
            return (-(-outputs // self.block[0]), -(-inputs // self.block[1]))
        return (1,) if self.strategy == "tensor" else (outputs, 1)


@dataclass(frozen=True)
class Compressed:
    """See the module."""

    schemes: tuple[Scheme, ...]
    name: str = "compressed-tensors"

    def holds(self, module: str, names: Container[str]) -> bool:
        """See `Layout.holds`."""
        return any(f"{module}.{end}" in names for end in (PACKED, SCALE))

    def read(self, tensors: MatrixTensors, inputs: int, outputs: int) -> Kept | Scaled:
        """See `Layout.read`."""
        scheme = self._scheme(tensors, inputs, outputs)
        if scheme.is_float:
            return read_scaled(tensors, SCALE, inputs, outputs, scheme.block)
        if PACKED in tensors:
            tensors.check(PACKED, (outputs, words_of(inputs, scheme.bits)), WORDS)
        else:
            tensors.check("weight", (outputs, inputs), INT8)
        size = scheme.group_size or inputs
        if inputs % size:
            raise tensors.wrong(
                SCALE, f"is of groups of {size}, which don't divide {inputs} features"
            )
        groups = inputs // size
        shape, _ = tensors.header(SCALE)
        scales = tensors.scales(SCALE, scheme.scale_shape(inputs, outputs) if len(shape) else ())
        return Kept(
            bits=scheme.bits,
            scales=np.ascontiguousarray(np.broadcast_to(scales, (outputs, groups))),
            zero_points=self._points(tensors, scheme, (outputs, groups)),
            group_of=_group_of(tensors, inputs, groups),
            numbers=lambda: _numbers(tensors, scheme.bits, inputs),
        )

    def _scheme(self, tensors: MatrixTensors, inputs: int, outputs: int) -> Scheme:
        """The scheme whose tensors a layer's are like."""
        is_packed = PACKED in tensors
        shape, _ = tensors.header(SCALE)
        found, dtype = tensors.header(PACKED if is_packed else "weight")
        fitting = [
            each
            for each in self.schemes
            if each.is_float == (dtype in FP8)
            and _like(each.scale_shape(inputs, outputs), shape)
            and (not is_packed or words_of(inputs, each.bits) == found[-1])
            and (each.symmetric or POINTS in tensors)
        ]
        if not fitting:
            has = "" if POINTS in tensors else ", without zero points,"
            raise tensors.wrong(
                SCALE,
                f"of shape {list(shape)} beside {dtype} numbers of shape {list(found)}{has} is "
                "what no scheme of config_groups gives",
            )
        # Where a layer has zero points, a scheme that has some is its own.
        return min(fitting, key=lambda each: each.symmetric == (POINTS in tensors))

    def _points(
        self, tensors: MatrixTensors, scheme: Scheme, shape: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Zero points [outputs, groups] of numbers without a sign."""
        middle = 1 << scheme.bits - 1
        if scheme.symmetric and POINTS not in tensors:
            return np.full(shape, middle, np.uint8)
        found, dtype = tensors.header(POINTS)
        if dtype in WORDS and PACKED in tensors and found != shape:
            packed = tensors.whole(POINTS, (words_of(shape[0], scheme.bits), shape[1]))
            return np.ascontiguousarray(unpack(packed.T, scheme.bits, shape[0]).T)
        plain, wanted = tensors.whole(POINTS, found), tensors.header(SCALE)[0]
        if not _like(wanted, found):
            raise tensors.wrong(POINTS, f"has shape {list(found)}, expected {list(wanted)}")
        points = np.broadcast_to(plain.astype(np.int64) + middle, shape)
        if points.min() < 0 or points.max() >= 2 * middle:
            raise tensors.wrong(POINTS, f"holds what {scheme.bits} bits can't hold")
        return points.astype(np.uint8)


def _like(wanted: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether scales have a shape, or are one number for what would be several rows' alike."""
    one = ((), (1,), (1, 1))
    return wanted == found or (wanted in one and found in one)


def _numbers(tensors: MatrixTensors, bits: int, inputs: int) -> NDArray[np.uint8]:
    """Numbers without a sign, [outputs, inputs]."""
    if PACKED in tensors:
        return unpack(tensors.raw(PACKED), bits, inputs)
    middle = 1 << bits - 1
    numbers = tensors.raw("weight").astype(np.int16) + middle
    if numbers.min() < 0 or numbers.max() >= 2 * middle:
        raise tensors.wrong("weight", f"holds what {bits} bits can't hold")
    return numbers.astype(np.uint8)


def _group_of(tensors: MatrixTensors, inputs: int, groups: int) -> NDArray[np.int32]:
    if GROUP_OF not in tensors:
        return groups_in_order(inputs, inputs // groups)
    group_of: NDArray[np.int32] = tensors.whole(GROUP_OF, (inputs,)).astype(np.int32)
    if (group_of == -1).all():  # what is there before anything was quantised
        return groups_in_order(inputs, inputs // groups)
    if group_of.min() < 0 or group_of.max() >= groups:
        raise tensors.wrong(GROUP_OF, f"names a group outside 0..{groups - 1}")
    return group_of


def read_compressed(section: Config) -> Compressed:
    """Reads the quantization_config of a checkpoint of compressed-tensors.

    Raises:
        CheckpointError: A format, or a scheme, that is not read.
    """
    section.require("format", *FORMATS)
    section.require("quantization_status", "compressed")
    section.require("kv_cache_scheme")
    for name in ("sparsity_config", "transform_config"):
        if section.get(name) not in (None, {}, {"format": "dense"}):
            section.require(name)
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise section.wrong("config_groups", "an object of schemes", groups)
    schemes = tuple(_read_group(section, name, value) for name, value in groups.items())
    refuse_unknown(section, "global_compression_ratio ignore version")
    return Compressed(schemes)


def _read_group(section: Config, name: str, value: Any) -> Scheme:
    """One of config_groups."""
    source = f"{section.source}, {name}"
    if not isinstance(value, dict) or not isinstance(value.get("weights"), dict):
        raise CheckpointError(
            f"{source}: it says nothing of weights", hint="quantise weights, or both"
        )
    group = Config(value, source, section.ignored)
    for each in ("targets", "weights", "input_activations"):
        group.get(each)
    group.require("format", *FORMATS)
    group.require("output_activations")
    refuse_unknown(group, "")
    return _read_scheme(Config(value["weights"], f"{source}, weights", section.ignored))


def _read_scheme(weights: Config) -> Scheme:
    kind = weights.get("type", "int")
    weights.require("type", "int", "float")
    bits = weights.integer("num_bits", 8, most=8, least=2)
    if kind == "float":
        weights.require("num_bits", 8)
    size = check_group_size(weights, -1)
    strategy = weights.get("strategy", "tensor" if size == -1 else "group")
    weights.require("strategy", *(STRATEGIES if kind == "float" else STRATEGIES[:3]))
    block = weights.get("block_structure")
    is_block = strategy == "block"
    symmetric = weights.flag("symmetric", True)
    if kind == "float":
        weights.require("symmetric", True)
        weights.require("strategy", "tensor", "channel", "block")
    if strategy == "group" and size == -1:
        strategy = "channel"
    refuse_unknown(weights, _OF_WEIGHTS)
    return Scheme(
        bits=bits,
        is_float=kind == "float",
        symmetric=symmetric,
        strategy=strategy,
        group_size=size if strategy == "group" else None,
        block=block_of(weights, "block_structure", block) if is_block else None,
    )
