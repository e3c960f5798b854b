"""An opened model on ONNX Runtime's CUDA provider: sessions and weights, loaded when first used.

What ONNX Runtime has no operator for, choosing a token and going on from it before the host has
seen it, CUDA kernels of ours do between its sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ojfa_export.backends.choice import PreparesByParts
from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.choosing import Chooser, choose_in_parts
from ojfa_export.backends.cuda.device import Device, PinnedArray
from ojfa_export.backends.cuda.kernels import Kernels, compile_kernels
from ojfa_export.backends.cuda.mailbox import ROWS, Asked, DeviceChoices, Mailbox
from ojfa_export.backends.cuda.sources import definitions
from ojfa_export.backends.onnxruntime_cuda.executor import OnnxRuntimeCudaExecutor
from ojfa_export.backends.onnxruntime_cuda.plan import read_plan
from ojfa_export.backends.onnxruntime_cuda.provider import Array, Work, open_session
from ojfa_export.backends.onnxruntime_cuda.weights import Weights
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import Choices, Choosing
from ojfa_export.models.spec import ModelSpec, Precision

# The kernels that are compiled for a model when it is opened.
SOURCES = ("embed.cu", "choose.cu", "sample.cu")


class OnnxRuntimeCudaEngines(PreparesByParts):
    """An opened model.

    Args:
        device: The GPU.
        spec: The model.
        weights: Directory of the weight files.
        engines: Plans by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.
        record: Whether steps of one token are replayed as CUDA graphs.

    Attributes:
        follows: See `backends.backend.Engines`.
        kernels: Of ours.
        mailbox: Where chosen tokens come.
    """

    follows = True

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
        self._plans = {name: read_plan(path, files) for name, path in engines.items()}
        self.precision: Precision = self._plans["embed"].precision
        self._store = Weights(device, weights, files)
        self._weights: dict[str, Mapping[str, DeviceArray]] = {}
        self._sessions: dict[str, ort.InferenceSession] = {}  # by graph file
        self._rotary = self._upload_rotary(rotary)
        self._key = object()  # of this model's recordings
        macros = definitions(spec, half=self.precision == "fp16")
        code = compile_kernels(macros, device.compute_capability, SOURCES)
        self.kernels, self.mailbox = Kernels(device, code), Mailbox(device)
        self._chooser = Chooser(self.kernels, self.mailbox, spec.vocab_size)
        self._states = self.arrays.lasting((ROWS, spec.hidden_size), np.float32)
        self._logits = self.arrays.lasting((ROWS, spec.vocab_size), np.float32)
        exits = np.arange(spec.blocks + 1, dtype=np.int32)[:, None, None]
        self._exits = self.arrays.upload(np.repeat(exits, ROWS, axis=1))
        self._pinned = PinnedArray((ROWS, spec.vocab_size), np.float32)

    def __del__(self) -> None:
        # Work that is under way still uses memory that sessions free at their end.
        with suppress(Exception):
            self.device.synchronize()

    def work(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Work:
        """A graph with its weights, on these inputs and outputs."""
        return Work(name, self._session(name), {**self.weights(name), **inputs}, outputs)

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
        """The tables of rotations, as blocks take them; LongRoPE has a second set of rows."""
        if self.spec.rotary_switch is None:
            return self._rotary
        half = {name: len(table) // 2 for name, table in self._rotary.items()}
        return {
            name: table[half[name] :] if long_context else table[: half[name]]
            for name, table in self._rotary.items()
        }

    def weights(self, name: str) -> Mapping[str, DeviceArray]:
        """A graph's weights, uploaded on first use."""
        if name not in self._weights:
            self._weights[name] = self._store.load(self._plans[name])
        return self._weights[name]

    def close(self, name: str) -> None:
        """Lets go of a graph's weights; work with them must be dropped as well."""
        self.device.recorder.clear()
        self._weights.pop(name, None)
        self._store.forget(self._plans[name])

    def load_blocks(self, depth: int) -> None:
        """Uploads the weights of the embedding and the first blocks, and opens their sessions."""
        for name in ("embed", *map(block_name, range(depth))):
            self.weights(name)
            self._session(name)

    def unload_heads(self) -> None:
        """Lets go of the heads' weights; they are uploaded again when used."""
        for name in ("exit_head", "final_head"):
            self.close(name)

    def executor(self, slots: int, capacity: int) -> OnnxRuntimeCudaExecutor:
        """Makes a KV cache; a block's part of it takes memory when it is first used."""
        return OnnxRuntimeCudaExecutor(self, slots, capacity)

    def logits(self, hidden: Float32 | DeviceArray, blocks_run: int) -> Float32:
        """Applies the head after so many blocks: [rows, H] to [rows, V]."""
        self.device.make_current()
        states = self.arrays.asarray(hidden)
        result = np.empty((len(states), self.spec.vocab_size), np.float32)
        for at in range(0, len(states), ROWS):
            part = self._in_place(states[at : at + ROWS])
            logits = self._logits[: len(part)]
            self._with_head(part, blocks_run, ("logits",), partial(self._fetch, logits))
            self.device.synchronize()
            result[at : at + ROWS] = self._pinned.array[: len(part)]
        return result

    def choose(self, hidden: Float32 | DeviceArray, blocks_run: int, how: Choosing) -> Choices:
        """Applies the head after so many blocks, and chooses on the device."""
        self.device.make_current()
        states = self.arrays.asarray(hidden)
        return choose_in_parts(partial(self._choose, blocks_run), states, how)

    def _choose(self, blocks_run: int, states: DeviceArray, how: Choosing) -> DeviceChoices:
        states, logits = self._in_place(states), self._logits[: len(states)]
        # Nothing is begun ahead of an exit's check here, so that there is nothing to call off.
        asked = Asked.of(Choosing(how.sampling), self.spec.vocab_size)
        self.mailbox.leave(how.draws)
        chosen = partial(self._chooser.choose, logits, asked)
        self._with_head(states, blocks_run, ("choose", asked), chosen)
        self.device.recorder.flush()
        return self.mailbox.expect(len(states))

    def _with_head(
        self,
        hidden: DeviceArray,
        blocks_run: int,
        then: tuple[Hashable, ...],
        follows: Callable[[], None],
    ) -> None:
        """Puts a head on the stream, and what is done with its logits (`then` is its key)."""
        name = "final_head" if blocks_run == self.spec.blocks else "exit_head"
        gated, count = "gates" in self._plans[name].weights, len(hidden)

        def work() -> None:
            exits = self._exits[blocks_run, :count].reshape(count)
            inputs = {"hidden": hidden, "blocks_run": exits}
            self.work(name, inputs, {"logits": self._logits[:count]}).run()
            follows()

        exit = blocks_run if gated else None
        self.add((self._key, name, exit, count, hidden.pointer, *then), work)

    def _fetch(self, logits: DeviceArray) -> None:
        self.device.download(logits.pointer, self._pinned.pointer, logits.nbytes)

    def _in_place(self, states: DeviceArray) -> DeviceArray:
        """Hidden states where they lie for long, as recordings refer to them."""
        if states.lasts:
            return states
        target = self._states[: len(states)]
        self.device.copy(states.pointer, target.pointer, states.nbytes)
        return target

    def _session(self, name: str) -> ort.InferenceSession:
        file = self._plans[name].graph
        if file not in self._sessions:
            model = self._files.read(self._directory / file)
            self._sessions[file] = open_session(model, name, int(self.device.stream))
        return self._sessions[file]

    def _upload_rotary(self, rotary: tuple[Float32, Float32] | None) -> Mapping[str, DeviceArray]:
        if rotary is None:
            return {}
        names = ("rotary_cos_table", "rotary_sin_table")
        dtype = DTYPES[self.precision]
        return {
            name: self.arrays.upload(table.astype(dtype))
            for name, table in zip(names, rotary, strict=True)
        }
