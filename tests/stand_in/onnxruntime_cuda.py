"""ONNX Runtime's CUDA provider on the stand-in's stream: the CPU provider, when its turn comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from stand_in.driver import Driver
from stand_in.kernels import view


class Binding:
    """An IOBinding; what lies in the host's memory is taken when it is bound."""

    def __init__(self, binding: ort.IOBinding) -> None:
        self.binding = binding
        self._taken: list[np.ndarray] = []

    def bind_input(
        self, name: str, device: str, _: int, dtype: Any, shape: tuple[int, ...], pointer: int
    ) -> None:
        if device == "cpu":
            self._taken.append(view(pointer, dtype, *shape).copy())
            pointer = self._taken[-1].ctypes.data
        else:
            assert device == "cuda"
        self.binding.bind_input(name, "cpu", 0, dtype, shape, pointer)

    def bind_output(
        self, name: str, device: str, _: int, dtype: Any, shape: tuple[int, ...], pointer: int
    ) -> None:
        assert device == "cuda"
        self.binding.bind_output(name, "cpu", 0, dtype, shape, pointer)


def make_onnxruntime(driver: Driver) -> SimpleNamespace:
    """The module, with sessions that work in a driver's memory."""

    class Session(ort.InferenceSession):
        def __init__(
            self,
            model: bytes,
            options: ort.SessionOptions,
            providers: list[tuple[str, dict[str, str]]],
            *,
            enable_fallback: int,
        ) -> None:
            assert [name for name, _ in providers] == ["CUDAExecutionProvider"]
            assert not enable_fallback
            super().__init__(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def io_binding(self) -> Binding:
            return Binding(super().io_binding())

        def run_with_iobinding(self, binding: Binding, options: ort.RunOptions) -> None:
            run = super().run_with_iobinding
            driver.put(lambda: run(binding.binding, options))

    module = SimpleNamespace(**vars(ort))
    module.InferenceSession = Session
    module.get_available_providers = lambda: ["CUDAExecutionProvider"]
    module.preload_dlls = lambda: print("this must not be seen")
    module.set_default_logger_severity = lambda severity: None
    return module
