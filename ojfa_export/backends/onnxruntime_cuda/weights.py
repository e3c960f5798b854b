"""Weights in device memory, each there once whatever graphs take it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.onnxruntime_cuda.plan import GraphPlan, Weight
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.models.precision import Precision

_Key = tuple[str, int, Precision]


class Weights:
    """Uploads weights.

    Args:
        device: Where they go.
        directory: Of the weight files.
        files: Opens them.
    """

    def __init__(self, device: Device, directory: Path, files: Files = UNCHECKED) -> None:
        self._device, self._directory, self._files = device, directory, files
        self._arrays = DeviceArrays(device)
        self._held: dict[_Key, DeviceArray] = {}

    def load(self, plan: GraphPlan) -> Mapping[str, DeviceArray]:
        """The weights of a graph, by its inputs."""
        return {name: self._get(weight) for name, weight in plan.weights.items()}

    def forget(self, plan: GraphPlan) -> None:
        """Lets go of a graph's weights; their memory is free when no one holds them."""
        for weight in plan.weights.values():
            self._held.pop(_key(weight), None)

    def _get(self, weight: Weight) -> DeviceArray:
        key = _key(weight)
        if key not in self._held:
            path, dtype = self._directory / weight.file, DTYPES[weight.stored]
            with self._files.mapped(path, dtype, weight.offset, weight.shape) as stored:
                used = stored.astype(DTYPES[weight.used], copy=False)
                self._held[key] = self._arrays.upload(used)
        return self._held[key]


def _key(weight: Weight) -> _Key:
    return weight.file, weight.offset, weight.used
