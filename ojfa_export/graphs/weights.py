"""Weights as ONNX external data: written once, referred to by any number of graphs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from ojfa_export.errors import CheckpointError
from ojfa_export.models.precision import Precision

# ONNX Runtime maps external data into memory; whole cache lines keep vector loads aligned.
ALIGNMENT = 64
# Weights are converted in pieces of this many elements, so that a large embedding table is
# never held twice.
CONVERSION_CHUNK = 1 << 24
NUMPY_DTYPES: Mapping[Precision, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
# As onnx.TensorProto has them.
DATA_TYPES: Mapping[Precision, int] = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}
PRECISIONS: Mapping[int, Precision] = {kind: name for name, kind in DATA_TYPES.items()}


@dataclass(frozen=True)
class TensorRef:
    """A tensor inside a file of raw little-endian data.

    Attributes:
        location: File name, relative to the directory of the graphs.
        dtype: An onnx.TensorProto data type.
    """

    location: str
    offset: int
    length: int
    dtype: int
    dims: tuple[int, ...]

    def rows(self, start: int, stop: int) -> TensorRef:
        """Some rows of a matrix."""
        row = self.length // self.dims[0]
        dims = (stop - start, *self.dims[1:])
        return TensorRef(
            self.location, self.offset + start * row, (stop - start) * row, self.dtype, dims
        )

    def proto(self, name: str) -> onnx.TensorProto:
        """The initializer that refers to the data."""
        tensor = onnx.TensorProto(name=name, data_type=self.dtype, dims=self.dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            tensor.external_data.add(key=key, value=str(getattr(self, key)))
        return tensor


class WeightFile:
    """A file of weights under construction.

    Args:
        directory: The graphs' directory.
        name: File name.
        precision: What matrices are stored as; vectors stay fp32 (norms and biases are tiny,
            and their rounding would be felt everywhere).
    """

    def __init__(self, directory: Path, name: str, precision: Precision) -> None:
        self.name = name
        self.precision = precision
        self._file = (directory / name).open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def add(self, name: str, array: NDArray[Any], precision: Precision | None = None) -> TensorRef:
        """Appends a tensor.

        Args:
            name: Named in errors.
            array: Any float dtype; converted, in bf16 what is in bf16 bit by bit.
            precision: Overrides the file's rule.

        Raises:
            CheckpointError: A value that fp16 can't hold.
        """
        precision = precision or (self.precision if array.ndim > 1 else "fp32")
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        flat = array.reshape(-1)
        for start in range(0, flat.size, CONVERSION_CHUNK):
            self._write(name, flat[start : start + CONVERSION_CHUNK], NUMPY_DTYPES[precision])
        length = self._file.tell() - offset
        return TensorRef(self.name, offset, length, DATA_TYPES[precision], array.shape)

    def add_integers(self, array: NDArray[np.int32]) -> TensorRef:
        """Appends whole numbers."""
        return self._add_raw(array.astype("<i4"), onnx.TensorProto.INT32)

    def add_bytes(self, array: NDArray[np.uint8]) -> TensorRef:
        """Appends bytes."""
        return self._add_raw(array, onnx.TensorProto.UINT8)

    def add_as_stored(self, array: NDArray[Any], dtype: int) -> TensorRef:
        """Appends numbers that are stored already, as they are.

        Args:
            array: Of `map_tensors`, or some rows of one.
            dtype: An onnx.TensorProto data type.
        """
        return self._add_raw(array, dtype)

    def _add_raw(self, array: NDArray[Any], dtype: int) -> TensorRef:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(array.tobytes())
        return TensorRef(self.name, offset, array.nbytes, dtype, array.shape)

    def _write(self, name: str, values: NDArray[Any], dtype: Any) -> None:
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(values, dtype=dtype)
        if dtype == np.float16 and not np.isfinite(converted).all():
            raise CheckpointError(
                f"weight '{name}' holds {np.abs(values.astype(np.float32)).max():.3g}, "
                "which fp16 can't hold (largest 65504)",
                hint="build with --precision fp32, or bf16 where the backend runs it",
            )
        self._file.write(converted.tobytes())


def map_tensors(model: onnx.ModelProto, directory: Path) -> dict[str, NDArray[Any]]:
    """The external tensors of a graph in a directory as they are stored, mapped into memory."""
    return {
        name: np.memmap(
            directory / ref.location,
            _numpy_dtype(ref.dtype),
            "r",
            ref.offset,
            ref.dims,
        )
        for name, ref in references(model).items()
    }


def references(model: onnx.ModelProto) -> dict[str, TensorRef]:
    """The external tensors that a graph refers to, by initializer name."""
    refs = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        # The format lets both be left out.
        width = _numpy_dtype(tensor.data_type).itemsize
        refs[tensor.name] = TensorRef(
            entry["location"],
            int(entry.get("offset", 0)),
            int(entry.get("length", width * math.prod(tensor.dims))),
            tensor.data_type,
            tuple(tensor.dims),
        )
    return refs


def precision_of(refs: Iterable[TensorRef]) -> Precision:
    """What a graph's matrix products are in, by its weights."""
    found = {PRECISIONS.get(ref.dtype, "fp32") for ref in refs}
    return next((each for each in found if each != "fp32"), "fp32")


def _numpy_dtype(data_type: int) -> np.dtype[Any]:
    """Of an onnx.TensorProto data type."""
    kind: Any = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    if data_type == onnx.TensorProto.BFLOAT16:  # float32 by onnx before 1.19
        kind = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(kind)
    return dtype
