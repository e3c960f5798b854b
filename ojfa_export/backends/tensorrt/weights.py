"""Weights in device memory, once for engines and kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Kernels, integer, pointer
from ojfa_export.backends.tensorrt.layout import LAYOUT_THREADS, inverse, tiles_of, words_of
from ojfa_export.backends.tensorrt.matrices import DeviceMatrix, Matrix
from ojfa_export.backends.tensorrt.plan import (
    GraphPlan,
    Place,
    QuantisedWeight,
    StoredTensor,
    Weight,
)
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
        self._held: dict[Place, Matrix] = {}

    @property
    def held(self) -> Collection[Place]:
        """What is on the device."""
        return self._held.keys()

    def load(self, plan: GraphPlan) -> dict[str, Any]:
        """The weights of a graph, by name: arrays, and `DeviceMatrix` where they are quantised."""
        arrays = {name: self._get(weight) for name, weight in plan.weights.items()}
        return arrays | {
            name: self._get_quantised(weight, plan) for name, weight in plan.quantised.items()
        }

    def forget(self, plan: GraphPlan) -> None:
        """Lets go of a graph's weights; their memory is free when no one holds them."""
        places = [each.place for each in plan.weights.values()]
        for place in places + [each.place for each in plan.quantised.values()]:
            self._held.pop(place, None)

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
        held = self._held.get(weight.place)
        if held is None:
            held = self._held[weight.place] = self._upload(weight)
        assert isinstance(held, DeviceArray)
        return held

    def _get_quantised(self, weight: QuantisedWeight, plan: GraphPlan) -> DeviceMatrix:
        held = self._held.get(weight.place)
        if held is None:
            held = self._held[weight.place] = self._lay_out(weight, plan)
        assert isinstance(held, DeviceMatrix)
        return held

    def _lay_out(self, weight: QuantisedWeight, plan: GraphPlan) -> DeviceMatrix:
        """Uploads a matrix as it is stored, and brings it into the layout of its products."""
        form = plan.form
        assert form is not None
        (outputs, columns), paired = weight.shape(form), weight.paired
        array = self._arrays.lasting(
            (1, words_of(outputs, columns, form, paired=paired)), np.uint32
        )
        stored = [
            None if tensor is None else self._for_the_moment(tensor, dtype)
            for tensor, dtype in (
                (weight.packed, np.uint8),
                (weight.scales, np.float32),
                (weight.zero_points, np.uint8),
            )
        ]
        self._kernels[plan.precision].launch(
            "lay_out_quantised",
            (4 * self._device.multiprocessors, 1, 1),
            (LAYOUT_THREADS, 1, 1),
            (
                pointer(array.pointer),
                *(pointer(None if each is None else each.pointer) for each in stored),
                *map(integer, (outputs, columns, tiles_of(outputs, paired=paired), int(paired))),
            ),
        )
        matrix = DeviceMatrix(array, (outputs, columns), paired)
        if weight.order is None:
            return matrix
        with self._mapped(weight.order, np.dtype(np.int32)) as mapped:
            order = np.array(mapped)
        upload = self._arrays.upload
        return replace(matrix, order=upload(order), places=upload(inverse(order)))

    def _for_the_moment(self, tensor: StoredTensor, dtype: Any) -> DeviceArray:
        with self._mapped(tensor, np.dtype(dtype)) as host:
            result = self._arrays.empty(host.shape, host.dtype)
            self._device.upload(host, result.pointer)
        return result

    def _mapped(
        self, tensor: StoredTensor, dtype: np.dtype[Any]
    ) -> AbstractContextManager[NDArray[Any]]:
        path = self._directory / tensor.file
        return self._files.mapped(path, dtype, tensor.offset, tensor.shape)

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
