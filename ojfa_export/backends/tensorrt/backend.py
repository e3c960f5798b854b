"""The TensorRT backend as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.cuda.arrays import DTYPES
from ojfa_export.backends.cuda.bandwidth import copy_bandwidth
from ojfa_export.backends.cuda.cublas import cublas_version
from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.draft import DraftLayer
from ojfa_export.backends.narrow_cache import CacheStorage
from ojfa_export.backends.tensorrt import api
from ojfa_export.backends.tensorrt.draft import TensorRtDraft
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.backends.tensorrt.exit_blocks import TensorRtExitBlocks
from ojfa_export.backends.tensorrt.parts import float8_lacks
from ojfa_export.backends.tensorrt.plan import PROFILES, check_built_for, read_plan
from ojfa_export.backends.tensorrt.probe import trace_block
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.weight_format import Quantised, QuantisedMatrix, WeightFormat
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec


class TensorRt:
    """TensorRT engines and CUDA kernels on the first visible GPU."""

    name = "tensorrt"
    suffix = ".json"
    # The C++ runtime runs these engines too, and refuses check heads; nor are they measured here.
    checks_by_default = False
    beside_quantised: tuple[Precision, ...] = ("fp16", "bf16")
    # Larger groups are fewer bytes; smaller ones than these would be a product of tiles each.
    group_sizes = (128, 64, 32, 256)
    runs_offsets = False
    beside_fp8_cache: tuple[Precision, ...] = ("fp16", "bf16")

    def __init__(self, cache: CacheStorage | None = None) -> None:
        self._cache = cache

    def with_cache(self, storage: CacheStorage) -> TensorRt:
        """See `backends.narrow_cache.NarrowsCache`."""
        return TensorRt(storage)

    def versions(self) -> dict[str, str]:
        """What the engines depend on."""
        device = the_device()
        cache = {} if self._cache is None else {"cache": self._cache}
        return {
            **cache,
            "tensorrt": api.version(),
            "gpu": device.name,
            "compute capability": ".".join(map(str, device.compute_capability)),
            "driver": f"CUDA {device.driver_version}",
            "cublas": cublas_version(device) or "none",
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

        build_engine(spec, graph, engine, self._cache)

    def open_engines(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> TensorRtEngines:
        """Opens built engines."""
        return TensorRtEngines(the_device(), spec, weights, engines, rotary, files)

    def open_draft(self, engines: Engines, layer: DraftLayer) -> TensorRtDraft:
        """Opens a bundle's draft layer, which shares weights with its model."""
        assert isinstance(engines, TensorRtEngines)
        return TensorRtDraft(engines, layer)

    def open_exit_blocks(self, engines: Engines, jump: BlockJump) -> TensorRtExitBlocks:
        """Opens a bundle's block jump; see `backends.block_jump.RunsBlockJumps`."""
        assert isinstance(engines, TensorRtEngines)
        return TensorRtExitBlocks(engines, jump)

    def lacks(self, storage: Quantised) -> str | None:
        """See `backends.quantised.RunsQuantised`."""
        if storage != "fp8":
            return None
        device = the_device()
        return float8_lacks(device.name, device.compute_capability)

    def quantise(self, columns: Float32, form: WeightFormat) -> QuantisedMatrix:
        """See `backends.quantised.RunsQuantised`."""
        from ojfa_export.backends.tensorrt.rounding import quantise

        return quantise(columns, form)

    def engine_names(self, spec: ModelSpec, graph: Path) -> list[str]:
        """Engines that a graph needs, equal ones of several graphs by the same name."""
        from ojfa_export.backends.tensorrt.build import engine_names  # needs onnx

        return engine_names(spec, graph)

    def describe_layers(self, engines: Mapping[str, Path]) -> dict[str, str]:
        """See `backends.backend.ShowsLayers`; what graphs share is told once."""
        from ojfa_export.backends.tensorrt.layers import describe_layers  # needs Polygraphy

        files = {
            plan.parent / file
            for plan in engines.values()
            for file in read_plan(plan).engines.values()
        }
        return {path.name: describe_layers(path) for path in sorted(files)}

    def trace_block(self, engines: Engines, block: int, hidden: Float32) -> dict[str, Float32]:
        """See `backends.backend.Tracing`."""
        assert isinstance(engines, TensorRtEngines)
        return trace_block(engines, block, hidden)

    def device(self) -> dict[str, str]:
        """GPU, driver and TensorRT's version."""
        return {name: each for name, each in self.versions().items() if name != "profiles"}

    def copy_bandwidth(self) -> float:
        """Bytes per second that a copy on the GPU reads and writes."""
        return copy_bandwidth(the_device())

    def weight_bytes(self, precision: Precision) -> int:
        """Of one number of a matrix of weights."""
        return int(DTYPES[precision].itemsize)


BACKEND: Backend = TensorRt()
