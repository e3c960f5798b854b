"""The ONNX Runtime backend as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.block_jump import BlockJump
from ojfa_export.backends.draft import DraftLayer
from ojfa_export.backends.onnxruntime.draft import OnnxRuntimeDraft
from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.backends.onnxruntime.exit_blocks import OnnxRuntimeExitBlocks
from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.weight_format import Quantised, QuantisedMatrix, WeightFormat
from ojfa_export.decoding.arrays import Float32
from ojfa_export.errors import BackendError
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# What blocks take: the tokens of a pass packed together, and where each slot's are among them.
FORM, RAGGED = "form of blocks", "ragged passes"


class OnnxRuntime:
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    suffix = ".onnx"
    checks_by_default = True
    beside_quantised: tuple[Precision, ...] = ("fp32",)
    # Smaller groups are nearer to the weights and take more room (docs/weights.md).
    group_sizes = (32, 16, 64, 128, 256)
    runs_offsets = True

    def versions(self) -> dict[str, str]:
        """What the engines depend on."""
        return {"onnxruntime": ort.__version__, FORM: RAGGED}

    def check(self, built_with: Mapping[str, str]) -> None:
        """Refuses blocks of another form; ONNX Runtime itself takes graphs of any version."""
        if built_with.get(FORM) != RAGGED:
            raise BackendError(
                "the bundle's engines for ONNX Runtime are of an earlier version of this program",
                hint="rebuild them with 'ojfa-export build BUNDLE --backend onnxruntime'",
            )

    def build_engine(self, spec: ModelSpec, graph: Path, engine: Path) -> None:
        """Builds the engine of one portable graph."""
        from ojfa_export.backends.onnxruntime.build import build_engine  # needs onnx

        build_engine(spec, graph, engine)

    def lacks(self, storage: Quantised) -> str | None:
        """See `backends.quantised.RunsQuantised`: its products are of whole numbers."""
        return f"which the {self.name} backend doesn't run" if storage == "fp8" else None

    def quantise(self, columns: NDArray[np.float32], form: WeightFormat) -> QuantisedMatrix:
        """Quantises a matrix; see `backends.quantised.RunsQuantised`."""
        return quantise(columns, form)

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

    def open_draft(self, engines: Engines, layer: DraftLayer) -> OnnxRuntimeDraft:
        """Opens a bundle's draft layer; see `backends.draft.RunsDrafts`."""
        return OnnxRuntimeDraft(layer)

    def open_exit_blocks(self, engines: Engines, jump: BlockJump) -> OnnxRuntimeExitBlocks:
        """Opens a bundle's block jump; see `backends.block_jump.RunsBlockJumps`."""
        return OnnxRuntimeExitBlocks(jump)


BACKEND: Backend = OnnxRuntime()
