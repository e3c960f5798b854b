"""Weights in device memory, once for engines and kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Kernels, integer, pointer
from ojfa_export.backends.tensorrt.plan import GraphPlan, Place, Weight
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.models.precision import Precision

ROW_BYTES = 16  # of what a kernel loads at once


class WeightStore:
    """Uploads weights; a tensor that several graphs refer to is on the device once.

    Args:
        device: Where they go.
        directory: Of the weight files.
        kernels: By precision, for transposing.
        files: Opens the files.
    """

    def __init__(
        self,
        device: Device,
        directory: Path,
        kernels: Mapping[Precision, Kernels],
        files: Files = UNCHECKED,
    ) -> None:
        self._device, self._directory, self._kernels = device, directory, kernels
        self._files = files
        self._arrays = DeviceArrays(device)
        self._held: dict[Place, DeviceArray] = {}

    @property
    def held(self) -> Collection[Place]:
        """What is on the device."""
        return self._held.keys()

    def load(self, plan: GraphPlan) -> dict[str, DeviceArray]:
        """The weights of a graph, by name."""
        return {name: self._get(weight) for name, weight in plan.weights.items()}

    def forget(self, plan: GraphPlan) -> None:
        """Lets go of a graph's weights; their memory is free when no one holds them."""
        for weight in plan.weights.values():
            self._held.pop(weight.place, None)

    def padded(self, weight: Weight, *, turned: bool) -> DeviceArray:
        """A matrix with rows filled up to whole 16-byte loads, transposed first where asked."""
        with self.mapped(weight) as stored:
            matrix = np.ascontiguousarray(stored.T) if turned else stored
            step = ROW_BYTES // matrix.dtype.itemsize
            width = -(-matrix.shape[1] // step) * step
            return self.filled(matrix, (matrix.shape[0], width))

    def filled(self, array: NDArray[Any], shape: tuple[int, ...]) -> DeviceArray:
        """An array on the device, filled up with zeros to a shape."""
        whole = np.zeros(shape, array.dtype)
        whole[tuple(map(slice, array.shape))] = array
        result = self._arrays.lasting(shape, array.dtype)
        self._device.upload(whole, result.pointer)
        return result

    def read(self, weight: Weight) -> NDArray[Any]:
        """A small weight, on the host."""
        with self.mapped(weight) as stored:
            return np.array(stored)

    def mapped(self, weight: Weight) -> AbstractContextManager[NDArray[Any]]:
        """A weight as its file has it, to be copied from."""
        dtype = DTYPES[weight.precision]
        return self._files.mapped(self._directory / weight.file, dtype, weight.offset, weight.shape)

    def _get(self, weight: Weight) -> DeviceArray:
        if weight.place not in self._held:
            self._held[weight.place] = self._upload(weight)
        return self._held[weight.place]

    def _upload(self, weight: Weight) -> DeviceArray:
        with self.mapped(weight) as host:
            return self._upload_array(host, weight)

    def _upload_array(self, host: NDArray[Any], weight: Weight) -> DeviceArray:
        if not weight.transposed:
            result = self._arrays.lasting(host.shape, host.dtype)
            self._device.upload(host, result.pointer)
            return result
        rows, columns = host.shape
        as_stored = self._arrays.empty(host.shape, host.dtype)
        self._device.upload(host, as_stored.pointer)
        result = self._arrays.lasting((columns, rows), host.dtype)
        self._kernels[weight.precision].launch(
            "transpose",
            (-(-columns // 32), -(-rows // 32), 1),
            (32, 8, 1),
            (
                pointer(result.pointer),
                pointer(as_stored.pointer),
                integer(rows),
                integer(columns),
            ),
        )
        return result
