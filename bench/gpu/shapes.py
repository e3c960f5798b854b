"""Published models' shapes with random weights, as graphs: decode time depends on shapes alone.

All blocks share one file of random numbers on the disk (hard links) and have their own memory on
the device, so that every block is read from there as a real one would be.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.draft import DraftLayer
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.draft_shortcut import DraftShortcut, rotations
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.names import block_name
from ojfa_export.bundle.weight_format import (
    PACKED,
    SCALES,
    ZERO_POINTS,
    QuantisedMatrix,
    WeightFormat,
)
from ojfa_export.graphs.block import block_graph
from ojfa_export.graphs.dialect import Portable
from ojfa_export.graphs.embed import embed_graph
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.heads import exit_head_graph, final_head_graph
from ojfa_export.graphs.quantised import add_matrix
from ojfa_export.graphs.weights import TensorRef, WeightFile
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

JumpKind = Literal["mlp", "block"]
PRECISION: Precision = "fp16"
# Enough numbers that no cache sees a pattern, few enough to be drawn in a second.
POOL = 1 << 24
# What leaves of a code of an 8-bit float one below 2, of which none is NaN; and the deviation of
# numbers that are all as likely then.
SMALL_FLOAT8, SMALL_DEVIATION = 0xBF, 0.63


def _spec(family: str, blocks: int, hidden: int, heads: int, inner: int, vocab: int) -> ModelSpec:
    gpt2 = family == "gpt2"
    return ModelSpec(
        family=family,
        blocks=blocks,
        hidden_size=hidden,
        vocab_size=vocab,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        attention_scales=((hidden // heads) ** -0.5,) * blocks,
        window=2047 if family == "phi3" else None,
        rotary_dim=0 if gpt2 else hidden // heads,
        rotary_switch=None,
        activation="gelu_tanh" if gpt2 else "silu",
        gated=not gpt2,
        norm="layer" if gpt2 else "rms",
        norm_epsilon=1e-5,
        max_positions=4096,
        tied_head=False,
        eos_token_ids=(),
    )


def _smollm2() -> ModelSpec:
    """SmolLM2-135M: three heads share keys and values, and the embedding is the head."""
    spec = _spec("llama", 30, 576, 9, 1536, 49152)
    return spec.model_copy(update={"kv_heads": 3, "tied_head": True, "max_positions": 8192})


SHAPES = {
    "smollm2-135m": _smollm2(),
    "llama2-7b": _spec("llama", 32, 4096, 32, 11008, 32000),
    "phi3-mini": _spec("phi3", 32, 3072, 32, 8192, 32064),
    "gpt2-xl": _spec("gpt2", 48, 1600, 25, 6400, 50257),
}


class RandomGraphs:
    """Writes a shape's portable graphs and weights.

    Args:
        spec: The shape.
        directory: Where to.
        max_length: Positions.
        precision: Of the matrices.
        form: What blocks' matrices and the head are quantised to; None for none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        directory: Path,
        max_length: int,
        precision: Precision = PRECISION,
        form: WeightFormat | None = None,
    ) -> None:
        self.spec, self.directory, self.max_length = spec, directory, max_length
        self._precision = precision
        self.rotary: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        if spec.rotary_dim:
            self.rotary = Rotary(spec.rotary_dim, "default", 1e4, max_length, {}).tables(max_length)
        self._pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
        self._form = form
        self._dialect = Portable(spec, self._precision, form)

    def write(self) -> None:
        """Writes embed, blocks, exit_head and final_head."""
        self.directory.mkdir(parents=True)
        self._embed()
        self._blocks()
        self._heads()

    def _values(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> NDArray[np.float32]:
        size = int(np.prod(shape))
        repeated = np.resize(self._pool * np.float32(scale) + np.float32(mean), size)
        return repeated.reshape(shape)

    def _embed(self) -> None:
        spec = self.spec
        with WeightFile(self.directory, "embed.bin", self._precision) as file:
            table = self._values(spec.vocab_size, spec.hidden_size)
            self._table = file.add("token_embedding", table)
            weights = {"token_embedding": self._table}
            if spec.learned_positions:
                rows = self._values(self.max_length, spec.hidden_size, scale=0.1)
                weights["position_embedding"] = file.add("position_embedding", rows)
        if self.rotary:
            with WeightFile(self.directory, "rotary.bin", "fp32") as file:
                names = ("rotary_cos", "rotary_sin")
                for name, table in zip(names, self.rotary, strict=True):
                    weights[name] = file.add(name, table)
        graph = embed_graph(spec, weights, self.max_length)
        (self.directory / "embed.onnx").write_bytes(graph.SerializeToString())

    def _blocks(self) -> None:
        spec = self.spec
        first = self._block_weights(f"{block_name(0)}.bin")
        for index in range(spec.blocks):
            name = block_name(index)
            if index:
                os.link(self.directory / f"{block_name(0)}.bin", self.directory / f"{name}.bin")
            weights = {key: replace(ref, location=f"{name}.bin") for key, ref in first.items()}
            graph = block_graph(spec, index, weights, self._dialect)
            (self.directory / f"{name}.onnx").write_bytes(graph.SerializeToString())

    def _block_weights(self, name: str) -> dict[str, TensorRef]:
        spec, hidden, inner = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        width = spec.heads * spec.head_dim
        qkv = width + 2 * spec.kv_heads * spec.head_dim
        matrices = {
            "attention.qkv": (hidden, qkv),
            "attention.out": (width, hidden),
            "mlp.up": (hidden, inner * (2 if spec.gated else 1)),
            "mlp.down": (inner, hidden),
        }
        refs = {}
        layer = spec.norm == "layer"
        with WeightFile(self.directory, name, self._precision) as file:
            for key in ("attention.norm", "mlp.norm"):
                refs[f"{key}.weight"] = file.add(key, self._values(hidden, scale=0.1, mean=1.0))
                if layer:
                    refs[f"{key}.bias"] = file.add(key, self._values(hidden, scale=0.1))
            for key, (rows, columns) in matrices.items():
                # Small, so that the sum over 32 blocks stays within fp16.
                refs |= self._matrix(file, f"{key}.weight", rows, columns, 0.3 * rows**-0.5)
                if layer:
                    refs[f"{key}.bias"] = file.add(key, self._values(columns, scale=0.1))
        return refs

    def _matrix(
        self, file: WeightFile, name: str, rows: int, columns: int, scale: float
    ) -> dict[str, TensorRef]:
        """Adds a matrix x @ W of a deviation, quantised where that is asked for."""
        form = self._form
        if form is None:
            return {name: file.add(name, self._values(rows, columns, scale=scale))}
        shapes = form.shapes(rows, columns)
        middle = form.middle * (0x11 if form.bits == 4 else 1)
        packed = self._pool.view(np.uint8).reshape(-1, 4)[:, 0]  # of fractions: any, as likely
        if form.is_float:
            packed = packed & np.uint8(SMALL_FLOAT8)
        # Numbers that are all as likely have this deviation.
        step = scale / (SMALL_DEVIATION if form.is_float else (1 << form.bits) * 12**-0.5)
        matrix = QuantisedMatrix(
            np.resize(packed, shapes[PACKED]),
            np.full(shapes[SCALES], step, np.float32),
            np.full(shapes[ZERO_POINTS], middle, np.uint8) if form.zero_points else None,
        )
        return add_matrix(file, name, matrix)

    def _heads(self) -> None:
        spec = self.spec
        k = max(1, spec.hidden_size // 100) + 1
        layer = spec.norm == "layer"
        with WeightFile(self.directory, "final_head.bin", self._precision) as file:
            norm = file.add("norm", self._values(spec.hidden_size, mean=1.0))
            weights = {"final_norm.weight": norm}
            scale, shape = spec.hidden_size**-0.5, (spec.hidden_size, spec.vocab_size)
            if self._form is not None:
                weights |= self._matrix(file, "head", *shape, scale)
            elif spec.tied_head:
                weights["head"] = self._table
            else:
                weights["head"] = file.add("head", self._values(*shape[::-1], scale=scale))
            if layer:
                weights["final_norm.bias"] = file.add("bias", self._values(spec.hidden_size))
        graph = final_head_graph(spec, weights, self._dialect)
        (self.directory / "final_head.onnx").write_bytes(graph.SerializeToString())
        with WeightFile(self.directory, "exit_head.bin", self._precision) as file:
            weights = {
                "project": file.add(
                    "project", self._values(spec.hidden_size, k, scale=0.02), "fp32"
                ),
                "project.bias": file.add("bias", self._values(k)),
                "vocabulary": file.add("vocabulary", self._values(spec.vocab_size, k)),
            }
            if layer:
                weights["vocabulary.bias"] = file.add("bias", self._values(spec.vocab_size))
        graph = exit_head_graph(spec, weights, self._dialect)
        (self.directory / "exit_head.onnx").write_bytes(graph.SerializeToString())

    def jump(self, kind: JumpKind, tokens: int) -> tuple[int, ...]:
        """Writes a jump in place of the exit head, and a check head; the others must be there.

        Args:
            kind: An MLP as wide as the model's, or one block for all exits.
            tokens: Of the check head.

        Returns:
            The exits that are worth timing.
        """
        spec, hidden, inner = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        exits = (max(1, spec.blocks // 10), spec.blocks // 2)
        width, up = spec.heads * spec.head_dim, inner * (2 if spec.gated else 1)

        def matrix(*shape: int) -> NDArray[np.float32]:
            return self._values(*shape, scale=0.3 * shape[-2] ** -0.5)

        jump: MlpShortcut | BlockShortcut
        if kind == "mlp":
            jump = MlpShortcut(
                scale=self._values(spec.blocks - 1, hidden, scale=0.1, mean=1.0),
                shift=self._values(spec.blocks - 1, hidden, scale=0.1),
                up=matrix(hidden, up),
                down=matrix(inner, hidden),
                norm=spec.norm,
                epsilon=spec.norm_epsilon,
                activation=spec.activation,
                gate=spec.gated,
            )
        else:
            weights = {
                "attention.norm.weight": self._values(1, hidden, scale=0.1, mean=1.0),
                "attention.qkv.weight": matrix(
                    1, hidden, width + 2 * spec.kv_heads * spec.head_dim
                ),
                "attention.out.weight": matrix(1, width, hidden),
                "mlp.norm.weight": self._values(1, hidden, scale=0.1, mean=1.0),
                "mlp.up.weight": matrix(1, hidden, up),
                "mlp.down.weight": matrix(1, inner, hidden),
            }
            scale = self._values(len(exits), hidden, scale=0.1, mean=1.0)
            jump = BlockShortcut(exits, scale, np.zeros_like(scale), weights)
        checkpoint: Any = SimpleNamespace(spec=spec)
        exporter = Exporter(checkpoint, self.directory, self._precision, self.max_length)
        exporter.shortcut(jump)
        head = "exit_head" if kind == "mlp" else "final_head"
        exporter.check_head(np.arange(tokens, dtype=np.int32), head)
        return exits

    def draft(self, tokens: int = 0) -> DraftShortcut:
        """Writes the graphs of a draft layer like one of the blocks; the others must be there.

        Args:
            tokens: Of a head of its own; 0 for the model's.
        """
        spec, hidden = self.spec, self.spec.hidden_size
        width = spec.heads * spec.head_dim

        def matrix(rows: int, columns: int) -> NDArray[np.float32]:
            return self._values(rows, columns, scale=0.3 * rows**-0.5)

        def norm() -> NDArray[np.float32]:
            return self._values(hidden, scale=0.1, mean=1.0)

        layer = DraftShortcut(
            depths=(1, spec.blocks // 2, spec.blocks),
            fuse=matrix(3 * hidden, hidden),
            embedding_norm=norm(),
            state_norm=norm(),
            qkv=matrix(2 * hidden, width + 2 * spec.kv_heads * spec.head_dim),
            out=matrix(width, hidden),
            mlp_norm=norm(),
            up=matrix(hidden, 2 * spec.intermediate_size),
            down=matrix(spec.intermediate_size, hidden),
            final_norm=norm(),
            head=matrix(tokens, hidden) if tokens else None,
            tokens=np.arange(tokens, dtype=np.int32) if tokens else None,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rope_theta=1e4,
            epsilon=spec.norm_epsilon,
        )
        checkpoint: Any = SimpleNamespace(spec=spec)
        Exporter(checkpoint, self.directory, self._precision, self.max_length).draft(layer)
        return layer

    def opened_draft(self, shortcut: DraftShortcut, engines: dict[str, Path]) -> DraftLayer:
        """The layer that was written, with its engines."""
        cos, sin = rotations(shortcut.rope_theta, shortcut.head_dim, 0, self.max_length)
        return DraftLayer(
            depths=shortcut.depths,
            spec=shortcut.spec_within(self.spec),
            vocab_size=self.spec.vocab_size,
            tokens=shortcut.tokens,
            weights=self.directory,
            engines=engines,
            rotary=(cos.astype(np.float32), sin.astype(np.float32)),
        )
