"""A checkpoint compiled for the race: graphs and engines, without the calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ojfa_export import backends
from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.bundle.names import graph_names
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.fold import FoldedHead
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.spec import ModelSpec

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Compiled:
    """Graphs and ONNX Runtime engines of a checkpoint.

    Attributes:
        weights: Directory of the portable graphs and their weight files.
        engines: Engine files by graph name.
        rotary: Cosines and sines [positions, rotary_dim/2], or None.
    """

    spec: ModelSpec
    weights: Path
    engines: dict[str, Path]
    rotary: tuple[Float32, Float32] | None

    def open(self) -> OnnxRuntimeEngines:
        """Opens the engines."""
        return OnnxRuntimeEngines(self.spec, self.weights, self.engines, self.rotary)


def compile_checkpoint(checkpoint: Path, directory: Path, max_length: int) -> Compiled:
    """Exports a checkpoint and builds its engines, as `ojfa-export build` does.

    The exit head has the paper's rank and random weights: its time depends on its shape alone.

    Args:
        checkpoint: Hugging Face directory.
        directory: Where graphs/ and engines/ are written.
        max_length: Positions that the rotary tables cover.
    """
    source = Checkpoint(checkpoint)
    graphs, engines = directory / "graphs", directory / "engines"
    for folder in (graphs, engines):
        folder.mkdir(parents=True)
    exporter = Exporter(source, graphs, "fp32", max_length)
    exporter.embed()
    for block in range(source.spec.blocks):
        exporter.block(block)
    exporter.final_head()
    exporter.shortcut(random_head(source.spec))
    backend = backends.load("onnxruntime")
    files = {name: engines / f"{name}.onnx" for name in graph_names(source.spec.blocks)}
    for name, file in files.items():
        backend.build_engine(source.spec, graphs / f"{name}.onnx", file)
    rotary = source.family.rotary(source.config)
    return Compiled(source.spec, graphs, files, rotary.tables(max_length) if rotary else None)


def random_head(spec: ModelSpec) -> FoldedHead:
    """A folded exit head of the paper's rank, floor(H/100), with random weights."""
    rng = np.random.default_rng(0)
    rank = max(1, spec.hidden_size // 100)

    def normal(*shape: int) -> Float32:
        return rng.standard_normal(shape, np.float32)

    bias = normal(spec.vocab_size) if spec.norm == "layer" else None
    return FoldedHead(
        project=normal(spec.hidden_size, rank),
        bias=normal(rank),
        eps=spec.norm_epsilon,
        weight=normal(spec.vocab_size, rank),
        logit_bias=bias,
    )
