"""What the backend keeps for each graph: which engines it is made of, and where its weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from ojfa_export.backends.cuda.plan import Part, read
from ojfa_export.backends.narrow_cache import CacheStorage
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError, BundleError
from ojfa_export.models.precision import BYTES, Precision

# Tokens of one call of an engine: few, as when sequences decode together, and many, as of a
# prompt; least, best, most. A longer prompt runs in pieces.
DECODE_TOKENS = (1, 1, 16)
PREFILL_TOKENS = (1, 512, 1024)
# Tokens of a pass that run at once, where no engine is asked; more run in pieces.
PASS_TOKENS = 2048
# Of the kernels' parameters; compiled kernels of a bundle must have the same. 3: tokens by place.
INTERFACE = 3
# The parts of a block, before and after its attention.
QKV, MLP = "qkv", "mlp"
PROFILES = (DECODE_TOKENS, PREFILL_TOKENS)


# What an engine file must agree with; the driver may be newer than the one it was built with.
DECISIVE = ("tensorrt", "gpu", "compute capability")


def has_engines(precision: Precision, form: WeightFormat | None = None) -> bool:
    """Whether a model has TensorRT's engines beside our kernels and cuBLASLt.

    None in bf16: TensorRT has it from version 10 on only, and what kernels and cuBLASLt run
    together is all there is to run. None of quantised weights, which no engine reads as they are.

    Args:
        precision: Of matrix products.
        form: What quantised matrices are stored as, where there are some.
    """
    return precision != "bf16" and form is None


def check_built_for(built_with: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuses engines of another GPU or TensorRT.

    Args:
        built_with: What the manifest says.
        here: The same of this machine.

    Raises:
        BackendError: They differ in what engines depend on.
    """
    if wrong := [name for name in DECISIVE if built_with.get(name) != here[name]]:
        differs = ", ".join(
            f"{name} {built_with.get(name, 'unknown')} (here: {here[name]})" for name in wrong
        )
        raise BackendError(
            f"the TensorRT engines were built for {differs}",
            hint="rebuild them here with 'ojfa-export build BUNDLE --backend tensorrt'",
        )


def profile_for(tokens: int) -> int:
    """Which of PROFILES serves this many tokens; at most the prefill profile's."""
    return 0 if tokens <= DECODE_TOKENS[-1] else 1


# Where a weight is in the bundle: its file and offset. One tensor may be part of several graphs.
Place = tuple[str, int]


class Weight(Part):
    """A weight in a file of the bundle's graphs, little-endian.

    Attributes:
        transposed: Whether it goes to the device as [columns, rows].
    """

    file: str
    offset: NonNegativeInt
    shape: tuple[PositiveInt, ...]
    precision: Precision
    transposed: bool

    @property
    def place(self) -> Place:
        """Where it is."""
        return self.file, self.offset

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * BYTES[self.precision]


class StoredTensor(Part):
    """A tensor of a quantised matrix in a file of the bundle's graphs, little-endian."""

    file: str
    offset: NonNegativeInt
    shape: tuple[PositiveInt, ...]


class QuantisedWeight(Part):
    """A quantised matrix in files of the bundle's graphs, as MatMulNBits has it.

    Attributes:
        packed: Numbers [outputs, groups, bytes].
        scales: [outputs, groups] fp32.
        zero_points: [outputs, bytes], or None.
        order: Of inputs, int32; None where they are in order.
        paired: Whether its outputs are gates and what they are multiplied with.
    """

    packed: StoredTensor
    scales: StoredTensor
    zero_points: StoredTensor | None = None
    order: StoredTensor | None = None
    paired: bool = False

    @property
    def place(self) -> Place:
        """Where its numbers are."""
        return self.packed.file, self.packed.offset

    def shape(self, form: WeightFormat) -> tuple[int, int]:
        """Outputs and columns."""
        outputs, groups = self.scales.shape
        return outputs, groups * form.group_size

    @property
    def tensors(self) -> list[StoredTensor]:
        """All of it."""
        each = (self.packed, self.scales, self.zero_points, self.order)
        return [tensor for tensor in each if tensor is not None]


class GraphPlan(Part):
    """One graph.

    Attributes:
        precision: Of matrix products.
        engines: Engine files, in this file's directory, by part: "qkv" and "mlp" of a block; none
            in bf16.
        kernels: Files of compiled CUDA kernels by precision, in this file's directory.
        interface: What parameters those kernels have.
        products: File of measured ways to make products (`algorithms.py`), in this file's
            directory; None where cuBLASLt wasn't there.
        weights: By their names in the graph.
        form: What quantised matrices are stored as; None where the model has none.
        cache: What keys and values are kept in; None for the precision of products.
        quantised: Those of the graph, by their names.
        activation_bytes: Memory that the largest of the engines works in.
    """

    precision: Precision
    engines: dict[str, str]
    kernels: dict[Precision, str]
    interface: int = 1
    products: str | None = None
    weights: dict[str, Weight]
    form: WeightFormat | None = None
    cache: CacheStorage | None = None
    quantised: dict[str, QuantisedWeight] = Field(default_factory=dict)
    activation_bytes: NonNegativeInt

    def to_json(self) -> bytes:
        """The text of its file; what has nothing quantised says nothing of that."""
        left_out = {"form", "quantised"} if self.form is None else set()
        left_out |= {"cache"} if self.cache is None else set()
        return self.model_dump_json(indent=2, exclude=left_out).encode()


def read_plan(path: Path, files: Files = UNCHECKED) -> GraphPlan:
    """Reads a graph's plan.

    Raises:
        BundleError: It is damaged, or names files elsewhere.
    """
    plan = read(path, GraphPlan, _named, "tensorrt", files)
    # The bundle holds no file but those that its manifest names with their digests.
    if plan.kernels and plan.interface != INTERFACE:
        raise BundleError(
            f"{path} is of another version of ojfa-export",
            hint="rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt'",
        )
    for name in _files(plan):
        if not (path.parent / name).is_file():
            raise BundleError(
                f"{path} names {name!r}, which the bundle doesn't hold",
                hint="rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt'",
            )
    return plan


def _files(plan: GraphPlan) -> Iterator[str]:
    yield from plan.engines.values()
    yield from plan.kernels.values()
    if plan.products is not None:
        yield plan.products


def _named(plan: GraphPlan) -> Iterator[str]:
    yield from _files(plan)
    for weight in plan.weights.values():
        yield weight.file
    for matrix in plan.quantised.values():
        for tensor in matrix.tensors:
            yield tensor.file
