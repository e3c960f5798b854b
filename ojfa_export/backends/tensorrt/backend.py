"""The TensorRT backend as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ojfa_export.backends.backend import Backend, Float32
from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.tensorrt import api
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.backends.tensorrt.plan import PROFILES, check_built_for
from ojfa_export.families.spec import ModelSpec


class TensorRt:
    """TensorRT engines and CUDA kernels on the first visible GPU."""

    name = "tensorrt"
    suffix = ".json"

    def versions(self) -> dict[str, str]:
        """What the engines depend on."""
        device = the_device()
        return {
            "tensorrt": api.version(),
            "gpu": device.name,
            "compute capability": ".".join(map(str, device.compute_capability)),
            "driver": f"CUDA {device.driver_version}",
            "profiles": ", ".join(
                f"{least} to {most} tokens, best {best}" for least, best, most in PROFILES
            ),
        }

    def check(self, built_with: Mapping[str, str]) -> None:
        """Refuses engines of another GPU or TensorRT before any is opened."""
        check_built_for(built_with, self.versions())

    def build_engine(self, spec: ModelSpec, graph: Path, engine: Path) -> None:
        """Builds what one portable graph needs; see `build.build_engine`."""
        from ojfa_export.backends.tensorrt.build import build_engine  # needs onnx

        build_engine(spec, graph, engine)

    def open_engines(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
    ) -> TensorRtEngines:
        """Opens built engines."""
        return TensorRtEngines(the_device(), spec, weights, engines, rotary)


BACKEND: Backend = TensorRt()
