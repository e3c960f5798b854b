"""Graphs, engines and a random shortcut of a checkpoint, without the rest of a build."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from shortcut_kinds import Kind

from ojfa_export.backends.onnxruntime.build import build_engine
from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.names import graph_names
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import ExitShortcut
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.fold import fold_if_narrow
from ojfa_export.graphs.kept import kept_weights
from ojfa_export.graphs.quantised import Quantiser
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session
from ojfa_export.verify.checks import Parts, language_head


@dataclass(frozen=True)
class Chain:
    """An exported checkpoint.

    Attributes:
        graphs: Directory of the portable graphs and the weights.
        engine_files: Engine files by graph name.
        engines: Opened once, blocks on first use.
    """

    checkpoint: Checkpoint
    precision: Precision
    max_length: int
    graphs: Path
    engine_files: dict[str, Path]
    shortcut: ExitShortcut
    engines: OnnxRuntimeEngines
    weights: WeightFormat | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def session(self, batch: int = 1, max_length: int | None = None) -> Session:
        return Session(self.spec, self.engines, batch, max_length or self.max_length)

    def open_engines(self) -> OnnxRuntimeEngines:
        rotary = self.checkpoint.family.rotary(self.checkpoint.config)
        tables = rotary.tables(self.max_length) if rotary else None
        return OnnxRuntimeEngines(self.spec, self.graphs, self.engine_files, tables)

    def parts(self) -> Parts:
        """For `verify_parts`; engines are opened anew, so that weights are read again."""
        return Parts(self.spec, self.precision, self.graphs, self.open_engines, self.shortcut)


def random_shortcut(hidden: int, rank: int, seed: int = 0) -> Shortcut:
    """A jump that keeps the size of hidden states, so that exit logits are as large as others."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    return Shortcut(
        scale=1 + normal(hidden, scale=0.3),
        shift=normal(hidden, scale=0.3),
        down=normal(hidden, rank, scale=hidden**-0.5),
        up=normal(rank, hidden, scale=rank**-0.5),
        kind="ojfa",
        fitted_at=1,
    )


def random_mlp(spec: ModelSpec, width: int, seed: int = 0) -> MlpShortcut:
    """An MLP of the model's own kind whose output is as large as its input."""
    rng = np.random.default_rng(seed)
    exits, hidden = spec.blocks - 1, spec.hidden_size

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(np.float32)

    return MlpShortcut(
        scale=1 + normal(exits, hidden, scale=0.3),
        shift=normal(exits, hidden, scale=0.3),
        up=normal(hidden, 2 * width if spec.gated else width, scale=hidden**-0.5),
        down=normal(width, hidden, scale=width**-0.5),
        norm=spec.norm,
        epsilon=spec.norm_epsilon,
        activation=spec.activation,
        gate=spec.gated,
    )


def of_kind(kind: Kind, spec: ModelSpec, rank: int, seed: int) -> ExitShortcut:
    """A random shortcut."""
    if kind == "mlp":
        return random_mlp(spec, 8 * rank, seed)
    shortcut = random_shortcut(spec.hidden_size, rank, seed)
    if kind == "narrow":
        return shortcut
    gates = np.random.default_rng(seed).normal(size=spec.blocks - 1).astype(np.float32)
    return replace(shortcut, kind="residual", residual=True, gates=gates)


def build_chain(
    checkpoint_dir: Path,
    tmp_path: Path,
    *,
    precision: Precision = "fp32",
    weights: WeightFormat | None = None,
    max_length: int = 128,
    rank: int = 8,
    seed: int = 0,
    kind: Kind = "narrow",
) -> Chain:
    """Exports a checkpoint into tmp_path/graphs and builds engines in tmp_path/engines.

    Args:
        checkpoint_dir: A checkpoint.
        tmp_path: Where to write.
        precision: Of the graphs.
        weights: What matrices are quantised to, if they are; those that the checkpoint has
            quantised are kept.
        max_length: Positions of the rotary tables and of a session's cache.
        rank: Of the random shortcut.
        seed: Of the random shortcut.
        kind: Of the shortcut; a residual one has gates.
    """
    checkpoint = Checkpoint(Path(checkpoint_dir))
    graphs, engine_directory = tmp_path / "graphs", tmp_path / "engines"
    for directory in (graphs, engine_directory):
        directory.mkdir(parents=True)
    quantiser = None if weights is None else Quantiser(weights, quantise)
    kept = kept_weights(checkpoint)
    exporter = Exporter(checkpoint, graphs, precision, max_length, quantiser, kept)
    weights = weights if kept is None else kept.form
    exporter.embed()
    for index in range(checkpoint.spec.blocks):
        exporter.block(index)
    exporter.final_head()
    shortcut = of_kind(kind, checkpoint.spec, rank, seed)
    exporter.exit_head(fold_if_narrow(shortcut, language_head(checkpoint)))
    files = {}
    for name in graph_names(checkpoint.spec.blocks):
        files[name] = engine_directory / f"{name}.onnx"
        build_engine(checkpoint.spec, graphs / f"{name}.onnx", files[name])
    rotary = checkpoint.family.rotary(checkpoint.config)
    engines = OnnxRuntimeEngines(
        checkpoint.spec, graphs, files, rotary.tables(max_length) if rotary else None
    )
    return Chain(checkpoint, precision, max_length, graphs, files, shortcut, engines, weights)
