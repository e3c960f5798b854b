"""The onnxruntime-cuda backend as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.cuda.arrays import DTYPES
from ojfa_export.backends.cuda.bandwidth import copy_bandwidth
from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.onnxruntime_cuda.engines import OnnxRuntimeCudaEngines
from ojfa_export.backends.onnxruntime_cuda.exit_blocks import OnnxRuntimeCudaExitBlocks
from ojfa_export.backends.onnxruntime_cuda.plan import NAME
from ojfa_export.backends.onnxruntime_cuda.provider import check_provider
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec


class OnnxRuntimeCuda:
    """ONNX Runtime's CUDA provider on the first visible GPU."""

    name = NAME
    suffix = ".json"
    checks_by_default = False  # not measured
    precisions: tuple[Precision, ...] = ("fp16", "fp32")

    def versions(self) -> dict[str, str]:
        """What the engines were built with; they are graphs, and not bound to a GPU."""
        check_provider()
        device = the_device()
        return {
            "onnxruntime": str(ort.__version__),
            "provider": "CUDA",
            "gpu": device.name,
            "compute capability": ".".join(map(str, device.compute_capability)),
            "driver": f"CUDA {device.driver_version}",
        }

    def check(self, built_with: Mapping[str, str]) -> None:
        """Makes sure of the provider; graphs of another machine run here as well."""
        check_provider()

    def build_engine(self, spec: ModelSpec, graph: Path, engine: Path) -> None:
        """Builds what one portable graph needs; see `build.build_engine`."""
        from ojfa_export.backends.onnxruntime_cuda.build import build_engine  # needs onnx

        build_engine(spec, graph, engine)

    def open_engines(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> OnnxRuntimeCudaEngines:
        """Opens built engines."""
        return OnnxRuntimeCudaEngines(the_device(), spec, weights, engines, rotary, files)

    def open_exit_blocks(self, engines: Engines, jump: BlockJump) -> OnnxRuntimeCudaExitBlocks:
        """Opens a bundle's block jump; see `backends.block_jump.RunsBlockJumps`."""
        assert isinstance(engines, OnnxRuntimeCudaEngines)
        return OnnxRuntimeCudaExitBlocks(engines, jump)

    def device(self) -> dict[str, str]:
        """GPU, driver and ONNX Runtime's version."""
        return self.versions()

    def copy_bandwidth(self) -> float:
        """Bytes per second that a copy on the GPU reads and writes."""
        return copy_bandwidth(the_device())

    def weight_bytes(self, precision: Precision) -> int:
        """Of one number of a matrix of weights."""
        return int(DTYPES[precision].itemsize)


BACKEND: Backend = OnnxRuntimeCuda()
