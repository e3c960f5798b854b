"""Arrays in device memory: as much of NumPy's interface as a session uses for hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.cuda.device import Device, Memory
from ojfa_export.models.bfloat16 import BFLOAT16
from ojfa_export.models.precision import Precision

DTYPES: dict[Precision, np.dtype[Any]] = {
    "bf16": BFLOAT16,
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}


class DeviceArray:
    """A contiguous array on the device; the last axis is whole in every view.

    Args:
        device: Where it lies.
        memory: Kept as long as this array or a view of it is.
        pointer: Address of the first element.
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(
        self, device: Device, memory: Memory, pointer: int, shape: tuple[int, ...], dtype: Any
    ) -> None:
        self._device, self._memory = device, memory
        self.pointer, self.shape, self.dtype = pointer, shape, np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(math.prod(self.shape) * self.dtype.itemsize)

    @property
    def lasts(self) -> bool:
        """Whether its memory is of lasting use, not of the pool of the moment."""
        return not self._memory.pooled

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> DeviceArray:
        if isinstance(key, slice) and key.step is None and len(self.shape) > 1:
            start, stop, _ = key.indices(self.shape[0])  # the way of every pass
            count = max(0, stop - start)
            return self._view(
                start * math.prod(self.shape[1:-1]) if count else 0, (count, *self.shape[1:])
            )
        rows, shape = self._rows(key)
        # As in NumPy, rows named one by one are a copy.
        keys = key if isinstance(key, tuple) else (key,)
        is_copy = any(isinstance(each, list | np.ndarray) for each in keys)
        if not is_copy and (rows.size == 0 or int(rows[-1] - rows[0]) == rows.size - 1):
            first = int(rows[0]) if rows.size else 0
            return self._view(first, shape)
        result = DeviceArrays(self._device).empty(shape, self.dtype)
        size, done = self._row_bytes, 0
        parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if rows.size else []
        for part in parts:  # neighbours together
            source, target = self.pointer + int(part[0]) * size, result.pointer + done * size
            self._device.copy(source, target, part.size * size)
            done += part.size
        return result

    def __setitem__(self, key: Any, value: DeviceArray) -> None:
        target = self[key]
        if target.shape != value.shape:
            raise ValueError(f"can't write {value.shape} to a place of {target.shape}")
        self._device.copy(value.pointer, target.pointer, value.nbytes)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same elements in another shape; a last axis of -1 is that of the array."""
        if shape[-1] == -1:
            shape = (*shape[:-1], self.shape[-1])
        return DeviceArray(self._device, self._memory, self.pointer, shape, self.dtype)

    def copy(self) -> DeviceArray:
        """A copy in its own memory."""
        result = DeviceArrays(self._device).empty(self.shape, self.dtype)
        self._device.copy(self.pointer, result.pointer, self.nbytes)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        host = np.empty(self.shape, self.dtype)
        self._device.download(self.pointer, host.ctypes.data, self.nbytes)
        self._device.synchronize()
        return host if dtype is None else host.astype(dtype, copy=False)

    @property
    def _row_bytes(self) -> int:
        return int(self.shape[-1] * self.dtype.itemsize)

    def _rows(self, key: Any) -> tuple[NDArray[np.int64], tuple[int, ...]]:
        """Which rows of the array seen as a matrix a key names, and the result's shape."""
        places = np.arange(math.prod(self.shape[:-1])).reshape(self.shape[:-1])[key]
        return places.reshape(-1), (*places.shape, self.shape[-1])

    def _view(self, row: int, shape: tuple[int, ...]) -> DeviceArray:
        pointer = self.pointer + row * self._row_bytes
        return DeviceArray(self._device, self._memory, pointer, shape, self.dtype)


class DeviceArrays:
    """Functions of NumPy's namespace, for arrays on a device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array for the moment, from the pool."""
        return self._new(shape, dtype, pooled=True)

    def lasting(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array that stays: weights, caches."""
        return self._new(shape, dtype, pooled=False)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A host array on the device, to stay."""
        result = self.lasting(array.shape, array.dtype)
        self._device.upload(np.ascontiguousarray(array), result.pointer)
        return result

    def asarray(self, array: NDArray[Any] | DeviceArray) -> DeviceArray:
        """An array on the device."""
        if isinstance(array, DeviceArray):
            return array
        host = np.ascontiguousarray(array)
        result = self.empty(host.shape, host.dtype)
        self._device.upload(host, result.pointer)
        return result

    def ascontiguousarray(self, array: NDArray[Any] | DeviceArray) -> DeviceArray:
        """The array itself, as every one is contiguous."""
        return self.asarray(array)

    def concatenate(self, arrays: Sequence[DeviceArray], axis: int = 0) -> DeviceArray:
        """Joins arrays along axis 0, or axis 1 of arrays of one row."""
        first = arrays[0]
        if axis and any(len(array) != 1 for array in arrays):
            raise ValueError("several rows can't be joined along their tokens")
        count = sum(array.shape[axis] for array in arrays)
        result = self.empty((*first.shape[:axis], count, *first.shape[axis + 1 :]), first.dtype)
        self._fill(result, arrays)
        return result

    def stack(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        """Joins arrays of one shape along a new first axis."""
        result = self.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
        self._fill(result, arrays)
        return result

    def _new(self, shape: tuple[int, ...], dtype: Any, *, pooled: bool) -> DeviceArray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = Memory(self._device, size, pooled=pooled)
        return DeviceArray(self._device, memory, memory.pointer, shape, dtype)

    def _fill(self, result: DeviceArray, arrays: Sequence[DeviceArray]) -> None:
        at = result.pointer
        for array in arrays:
            if array.nbytes:
                self._device.copy(array.pointer, at, array.nbytes)
            at += array.nbytes
