"""What a layout of quantised weights does, and the tensors of one matrix that it reads."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.quantised.kept import Kept, Scaled
from ojfa_export.models.checkpoint.weight_files import read_headers, read_stored
from ojfa_export.models.families.config import Config

# As safetensors and NumPy name them.
WORDS = ("I32", "int32")
WHOLE = (*WORDS, "I64", "I16", "I8", "U8", "int64", "int16", "int8", "uint8")
FLOATS = ("F32", "F16", "BF16")
WEIGHT = ".weight"


class Layout(Protocol):
    """One way in which checkpoints hold quantised matrices."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def holds(self, module: str, names: Container[str]) -> bool:
        """Whether a layer's matrix is quantised.

        Args:
            module: The layer, without `.weight`.
            names: Tensors that the checkpoint has.
        """
        ...

    def read(self, tensors: MatrixTensors, inputs: int, outputs: int) -> Kept | Scaled:
        """A matrix, whose scales and zero points are read and checked now, its numbers later.

        Args:
            tensors: Of the layer.
            inputs: Features that it multiplies.
            outputs: Features that come out.

        Raises:
            CheckpointError: A tensor is missing, of another shape or dtype, or holds NaN.
        """
        ...


class MatrixTensors:
    """The tensors of one layer.

    Args:
        module: The layer's name.
        files: Where every tensor of the checkpoint is.
        directory: The checkpoint's, for messages.
    """

    def __init__(self, module: str, files: Mapping[str, Path], directory: Path) -> None:
        self.module, self._files, self._directory = module, files, directory

    def __contains__(self, end: str) -> bool:
        return f"{self.module}.{end}" in self._files

    def header(self, end: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype as the file names it."""
        name, path = self._found(end)
        return read_headers(path, [name])[name]

    def check(self, end: str, shape: tuple[int, ...] | None, dtypes: Collection[str]) -> None:
        """Refuses a tensor of another shape or dtype.

        Raises:
            CheckpointError: It names the tensor.
        """
        found, dtype = self.header(end)
        if dtype not in dtypes:
            raise self.wrong(end, f"has dtype {dtype}, expected {' or '.join(dtypes)}")
        if shape is not None and found != shape:
            raise self.wrong(end, f"has shape {list(found)}, expected {list(shape)}")

    def raw(self, end: str) -> NDArray[Any]:
        """A tensor as it is stored."""
        name, path = self._found(end)
        return read_stored(path, name)

    def whole(self, end: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Whole numbers of a shape."""
        self.check(end, shape, WHOLE)
        return self.raw(end)

    def scales(self, end: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Finite scales of a shape."""
        self.check(end, shape, (*FLOATS, "F8_E8M0"))
        scales = self.raw(end).astype(np.float32)
        if not np.isfinite(scales).all():
            raise self.damaged(end, "NaN or infinity")
        return scales

    def damaged(self, end: str, what: str) -> CheckpointError:
        """The error for a tensor that holds what no sound one does."""
        return CheckpointError(
            f"{self._where(end)} holds {what}", hint="the checkpoint is damaged; get a sound one"
        )

    def wrong(self, end: str, what: str) -> CheckpointError:
        """The error for a tensor that is not what it must be."""
        return CheckpointError(
            f"{self._where(end)} {what}",
            hint="config.json and the weights belong to different models, or one is damaged",
        )

    def group_size(self, inputs: int, groups: int, end: str) -> int:
        """Inputs that share a scale, where there are so many groups of them.

        Raises:
            CheckpointError: The groups are not whole.
        """
        if groups < 1 or inputs % groups:
            raise CheckpointError(
                f"{self._where(end)} has {groups} groups, which don't divide {inputs} features",
                hint="quantise the model with a group size that divides its features",
            )
        return inputs // groups

    def _where(self, end: str) -> str:
        name, path = self._found(end)
        return f"tensor '{name}' in {path}"

    def _found(self, end: str) -> tuple[str, Path]:
        name = f"{self.module}.{end}"
        if name not in self._files:
            raise CheckpointError(
                f"tensor '{name}' is missing in {self._directory}",
                hint="the quantised matrix needs it; download the checkpoint again",
            )
        return name, self._files[name]


def check_group_size(section: Config, default: int) -> int:
    """The field `group_size`: a number of inputs, or -1 for all of them.

    Raises:
        CheckpointError: It is something else.
    """
    size = section.integer("group_size", default, least=-1)
    if size == 0:
        raise section.wrong("group_size", "a positive integer or -1", size)
    return size


def refuse_unknown(section: Config, harmless: str) -> None:
    """Refuses fields of a quantization_config that nobody understood.

    Args:
        section: The object, of which the fields that matter have been read.
        harmless: Fields that say nothing of the weights, with blanks between.

    Raises:
        CheckpointError: It names the first.
    """
    unknown = section.unread(harmless.split())
    if unknown:
        raise CheckpointError(
            f"{section.source}: fields not understood: {', '.join(unknown):.500}",
            hint="they could change what the numbers mean; if you know that they don't, give "
            f"--ignore-config-field quantization_config.{unknown[0]:.60}",
        )
