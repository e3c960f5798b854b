"""An opened model on ONNX Runtime's CUDA provider: sessions and weights, loaded when first used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path

import onnxruntime as ort

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels
from ojfa_export.backends.cuda.mailbox import Mailbox
from ojfa_export.backends.cuda.sources import definitions
from ojfa_export.backends.onnxruntime_cuda.plan import read_plan
from ojfa_export.backends.onnxruntime_cuda.provider import Array, Work, open_session
from ojfa_export.backends.onnxruntime_cuda.weights import Weights
from ojfa_export.backends.rotations import rows_of_sets
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# The kernels that are compiled for a model when it is opened.
SOURCES = ("embed.cu", "choose.cu", "sample.cu")


class OpenedModel:
    """Weights, graphs and kernels that passes and heads need.

    Args:
        device: The GPU.
        spec: The model.
        weights: Directory of the weight files.
        engines: Plans by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.
        record: Whether steps of one token are replayed as CUDA graphs.

    Attributes:
        kernels: Of ours.
        mailbox: Where chosen tokens come.
    """

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
        *,
        record: bool = True,
    ) -> None:
        device.make_current()
        self.device, self.spec, self.record = device, spec, record
        self.arrays = DeviceArrays(device)
        self._files = files
        self._directory = next(iter(engines.values())).parent
        self.plans = {name: read_plan(path, files) for name, path in engines.items()}
        self.precision: Precision = self.plans["embed"].precision
        self._store = Weights(device, weights, files)
        self._weights: dict[str, Mapping[str, DeviceArray]] = {}
        self._sessions: dict[str, ort.InferenceSession] = {}  # by graph file
        self._rotary = self._upload_rotary(rotary)
        macros = definitions(spec, self.precision)
        code = compile_kernels(macros, device.compute_capability, SOURCES)
        self.kernels, self.mailbox = Kernels(device, code), Mailbox(device)

    def __del__(self) -> None:
        # Work that is under way still uses memory that sessions free at their end.
        with suppress(Exception):
            self.device.synchronize()

    def work(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Work:
        """A graph with its weights, on these inputs and outputs."""
        return Work(name, self.session(name), {**self.weights(name), **inputs}, outputs)

    def add(self, key: tuple[Hashable, ...], work: Callable[[], None]) -> None:
        """Adds work to the step, or does it at once where steps aren't recorded.

        Args:
            key: As of `Recorder.add`.
            work: Puts something on the stream.
        """
        if self.record:
            self.device.recorder.add(key, work)
        else:
            self.device.recorder.flush()
            work()

    def rotary(self, *, long_context: bool) -> Mapping[str, DeviceArray]:
        """The tables of rotations, as blocks take them."""
        if not self._rotary:
            return {}
        sets = rows_of_sets(self.spec, len(self._rotary[0]), long_context=long_context)
        tables = [table[rows] for rows in sets for table in self._rotary]
        names = (f"rotary_{name}_table" for name in self.spec.rotations)
        return dict(zip(names, tables, strict=True))

    def weights(self, name: str) -> Mapping[str, DeviceArray]:
        """A graph's weights, uploaded on first use."""
        if name not in self._weights:
            self._weights[name] = self._store.load(self.plans[name])
        return self._weights[name]

    def close(self, name: str) -> None:
        """Lets go of a graph's weights; work with them must be dropped as well."""
        self.device.recorder.clear()
        self._weights.pop(name, None)
        self._store.forget(self.plans[name])

    def session(self, name: str) -> ort.InferenceSession:
        """The session of a graph, opened on first use."""
        file = self.plans[name].graph
        if file not in self._sessions:
            model = self._files.read(self._directory / file)
            self._sessions[file] = open_session(model, name, int(self.device.stream))
        return self._sessions[file]

    def _upload_rotary(self, rotary: tuple[Float32, Float32] | None) -> tuple[DeviceArray, ...]:
        dtype = DTYPES[self.precision]
        return tuple(self.arrays.upload(table.astype(dtype)) for table in rotary or ())
