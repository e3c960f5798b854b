"""The ONNX Runtime backend as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from ojfa_export.backends.backend import Backend, Float32
from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.families.spec import ModelSpec


class OnnxRuntime:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    suffix = ".onnx"

    def versions(self) -> dict[str, str]:
        """What the engines depend on."""
        return {"onnxruntime": ort.__version__}

    def check(self, built_with: Mapping[str, str]) -> None:
        """Nothing to refuse: the graphs are built anew for the machine when they are opened."""

    def build_engine(self, spec: ModelSpec, graph: Path, engine: Path) -> None:
        """Builds the engine of one portable graph."""
        from ojfa_export.backends.onnxruntime.build import build_engine  # needs onnx

        build_engine(spec, graph, engine)

    def open_engines(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> OnnxRuntimeEngines:
        """Opens built engines."""
        return OnnxRuntimeEngines(spec, weights, engines, rotary, files)


BACKEND: Backend = OnnxRuntime()
