"""TensorRT engines, ready to run on the stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ojfa_export.backends.cuda.device import Device, Memory
from ojfa_export.backends.cuda.sizes import readable
from ojfa_export.backends.tensorrt import api
from ojfa_export.backends.tensorrt.plan import PROFILES, profile_for
from ojfa_export.bundle.checked import UNCHECKED, Files


class Engine:
    """An engine with a context for each profile.

    Args:
        device: Where it runs.
        path: The engine file.
        files: Opens it.

    Attributes:
        activation_bytes: Memory that it works in.
    """

    def __init__(self, device: Device, path: Path, files: Files = UNCHECKED) -> None:
        self._device, self._name = device, path.stem
        self._engine = api.deserialize(path.stem, files.read(path))
        self.activation_bytes = api.activation_bytes(self._engine)
        stream = int(device.stream)
        self._contexts = [
            api.create_context(self._engine, index, stream) for index in range(len(PROFILES))
        ]
        self._tokens = [0 for _ in PROFILES]

    def work_in(self, memory: Memory) -> None:
        """Gives it its memory, which engines of one stream share."""
        for context in self._contexts:
            api.set_activations(context, memory.pointer, self.activation_bytes)

    def run(
        self, tokens: int, per_token: Mapping[str, tuple[int, int]], fixed: Mapping[str, int]
    ) -> None:
        """Puts the engine on the stream.

        Args:
            tokens: How many.
            per_token: Address and width of each input [tokens, width], and address of the output
                with width 0.
            fixed: Addresses of the weights.

        Raises:
            BackendError: TensorRT refuses.
        """
        index = profile_for(tokens)
        context = self._contexts[index]
        for name, (address, width) in per_token.items():
            if width and self._tokens[index] != tokens:
                context.set_input_shape(name, (tokens, width))
            context.set_tensor_address(name, address)
        for name, address in fixed.items():
            context.set_tensor_address(name, address)
        self._tokens[index] = tokens
        if not context.execute_async_v3(int(self._device.stream)):
            raise api.failure(self._name, readable(self._device.available()))


class EngineSet:
    """All engines of a model, opened together: they share one buffer of activations.

    Args:
        device: Where they run.
        paths: The engine files.
        files: Opens them.
    """

    def __init__(self, device: Device, paths: Iterable[Path], files: Files = UNCHECKED) -> None:
        self._engines = {path.name: Engine(device, path, files) for path in paths}
        size = max(engine.activation_bytes for engine in self._engines.values())
        self._memory = Memory(device, size, pooled=False)
        for engine in self._engines.values():
            engine.work_in(self._memory)

    def __getitem__(self, file: str) -> Engine:
        return self._engines[file]
