"""Graphs, engines and a random shortcut of a checkpoint, without the rest of a build."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from shortcut_kinds import Kind

from ojfa_export.backends.backend import Backend
from ojfa_export.backends.block_jump import BlockJump, open_jump
from ojfa_export.backends.onnxruntime.build import build_engine
from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines
from ojfa_export.backends.onnxruntime.exit_blocks import OnnxRuntimeExitBlocks
from ojfa_export.backends.onnxruntime.quantise import quantise
from ojfa_export.backends.tensorrt.rounding import quantise as to_floats
from ojfa_export.bundle.block_shortcut import KEY_NORM, QUERY_NORM, BlockShortcut
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.names import CHECK_HEAD, graph_names
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
        check_tokens: Ids of a check head, where there is one.
    """

    checkpoint: Checkpoint
    precision: Precision
    max_length: int
    graphs: Path
    engine_files: dict[str, Path]
    shortcut: ExitShortcut
    engines: OnnxRuntimeEngines
    weights: WeightFormat | None = None
    check_tokens: np.ndarray | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def session(self, batch: int = 1, max_length: int | None = None) -> Session:
        return Session(self.spec, self.engines, batch, max_length or self.max_length)

    def open_engines(self) -> OnnxRuntimeEngines:
        files = self.engine_files
        return open_onnxruntime(self.checkpoint, self.graphs, files, self.shortcut, self.max_length)

    def open_on(self, backend: Backend, directory: Path) -> Any:
        """Engines of another backend, built in a directory: a check head and exits' blocks too."""
        blocks = self.shortcut.blocks if isinstance(self.shortcut, BlockShortcut) else 0
        plans = {name: directory / f"{name}.json" for name in graph_names(self.spec.blocks, blocks)}
        for name, plan in plans.items():
            backend.build_engine(self.spec, self.graphs / f"{name}.onnx", plan)
        if self.check_tokens is not None:
            plans[CHECK_HEAD] = directory / f"{CHECK_HEAD}.json"
            narrowed = self.spec.with_vocabulary(len(self.check_tokens))
            backend.build_engine(narrowed, self.graphs / f"{CHECK_HEAD}.onnx", plans[CHECK_HEAD])
        rotary = self.checkpoint.family.rotary(self.checkpoint.config)
        tables = rotary.tables(self.max_length) if rotary else None
        engines = backend.open_engines(self.spec, self.graphs, plans, tables)
        if isinstance(self.shortcut, BlockShortcut):
            exits = self.shortcut.exits
            jump = BlockJump(exits, blocks, self.spec, self.graphs, plans, tables)
            open_jump(backend, engines, jump)
        return engines

    def parts(self) -> Parts:
        """For `verify_parts`; engines are opened anew, so that weights are read again."""
        return Parts(
            self.spec,
            self.precision,
            self.graphs,
            self.open_engines,
            self.shortcut,
            self.check_tokens,
        )


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


def random_blocks(
    spec: ModelSpec, exits: tuple[int, ...], seed: int = 0, *, each: bool = False
) -> BlockShortcut:
    """A block of the model's own kind, or one for each exit, whose products keep sizes.

    Biases are there where every family's blocks may have them.
    """
    rng = np.random.default_rng(seed)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    blocks = len(exits) if each else 1

    def matrix(inputs: int, outputs: int) -> np.ndarray:
        return (rng.normal(size=(blocks, inputs, outputs)) * inputs**-0.5).astype(np.float32)

    def vector(features: int, around: float) -> np.ndarray:
        return (around + 0.3 * rng.normal(size=(blocks, features))).astype(np.float32)

    weights = {
        "attention.qkv.weight": matrix(hidden, queries + 2 * keys),
        "attention.out.weight": matrix(queries, hidden),
        "mlp.up.weight": matrix(hidden, 2 * inner if spec.gated else inner),
        "mlp.down.weight": matrix(inner, hidden),
    }
    for name in [name for name in weights if rng.random() < 0.5]:
        weights[name.replace("weight", "bias")] = vector(weights[name].shape[-1], 0)
    norms = ["attention.norm", "mlp.norm"]
    norms += ["attention.after_norm", "mlp.after_norm"] if spec.norms == "both" else []
    for norm in norms:
        weights[f"{norm}.weight"] = vector(hidden, 1)
        if spec.norm == "layer":
            weights[f"{norm}.bias"] = vector(hidden, 0)
    for name, features in zip((QUERY_NORM, KEY_NORM), spec.qk_norm_features, strict=True):
        if features:
            weights[name] = vector(features, 1)
    scale, shift = (
        1 + 0.3 * rng.normal(size=(len(exits), hidden)),
        rng.normal(size=(len(exits), hidden)),
    )
    return BlockShortcut(exits, scale.astype(np.float32), 0.3 * shift.astype(np.float32), weights)


def of_kind(kind: Kind, spec: ModelSpec, rank: int, seed: int) -> ExitShortcut:
    """A random shortcut."""
    if kind == "mlp":
        return random_mlp(spec, 8 * rank, seed)
    if kind == "block":
        exits = tuple(sorted({1, spec.blocks - 1}))
        return random_blocks(spec, exits, seed, each=bool(seed % 2))
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
    check_tokens: np.ndarray | None = None,
    shortcut: ExitShortcut | None = None,
    float_groups: tuple[int, ...] = (),
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
        check_tokens: Ids of a check head, rising.
        shortcut: In place of a random one.
        float_groups: Of 8-bit floats of a checkpoint that are to be kept.
    """
    checkpoint = Checkpoint(Path(checkpoint_dir))
    graphs, engine_directory = tmp_path / "graphs", tmp_path / "engines"
    for directory in (graphs, engine_directory):
        directory.mkdir(parents=True)
    quantiser = None
    if weights is not None:
        quantiser = Quantiser(weights, to_floats if weights.is_float else quantise)
    kept = kept_weights(checkpoint, float_groups)
    exporter = Exporter(checkpoint, graphs, precision, max_length, quantiser, kept)
    weights = weights if kept is None else kept.form
    exporter.embed()
    for index in range(checkpoint.spec.blocks):
        exporter.block(index)
    exporter.final_head()
    shortcut = of_kind(kind, checkpoint.spec, rank, seed) if shortcut is None else shortcut
    exporter.shortcut(fold_if_narrow(shortcut, language_head(checkpoint)))
    files = {}
    blocks = shortcut.blocks if isinstance(shortcut, BlockShortcut) else 0
    for name in graph_names(checkpoint.spec.blocks, blocks):
        files[name] = engine_directory / f"{name}.onnx"
        build_engine(checkpoint.spec, graphs / f"{name}.onnx", files[name])
    if check_tokens is not None:
        exporter.check_head(check_tokens, "final_head" if blocks else "exit_head")
        files[CHECK_HEAD] = engine_directory / f"{CHECK_HEAD}.onnx"
        narrowed = checkpoint.spec.with_vocabulary(len(check_tokens))
        build_engine(narrowed, graphs / f"{CHECK_HEAD}.onnx", files[CHECK_HEAD])
    engines = open_onnxruntime(checkpoint, graphs, files, shortcut, max_length)
    return Chain(
        checkpoint, precision, max_length, graphs, files, shortcut, engines, weights, check_tokens
    )


def open_onnxruntime(
    checkpoint: Checkpoint,
    graphs: Path,
    files: dict[str, Path],
    shortcut: ExitShortcut,
    max_length: int,
) -> OnnxRuntimeEngines:
    """Opens engines of ONNX Runtime, the blocks of a block jump with them."""
    rotary, spec = checkpoint.family.rotary(checkpoint.config), checkpoint.spec
    tables = rotary.tables(max_length) if rotary else None
    engines = OnnxRuntimeEngines(spec, graphs, files, tables)
    if isinstance(shortcut, BlockShortcut):
        jump = BlockJump(shortcut.exits, shortcut.blocks, spec, graphs, files, tables)
        engines.exit_blocks = OnnxRuntimeExitBlocks(jump)
    return engines
