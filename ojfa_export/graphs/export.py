"""Writes a checkpoint as graphs: one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.draft_shortcut import DraftShortcut, rotations
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.names import CHECK_HEAD, DRAFT_GRAPHS, block_name, exit_block_name
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.weight_format import BLOCK_MATRICES, ENDS, QuantisedMatrix
from ojfa_export.decoding.arrays import Int32
from ojfa_export.graphs.block import block_graph, exit_block_graph
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.draft import draft_part_graph
from ojfa_export.graphs.embed import embed_graph
from ojfa_export.graphs.fold import FoldedHead
from ojfa_export.graphs.heads import final_head_graph, jump_head_graph
from ojfa_export.graphs.input_factor import InputFactor
from ojfa_export.graphs.kept import KeptWeights, check_exact
from ojfa_export.graphs.quantised import Quantiser, add_matrix
from ojfa_export.graphs.weights import TensorRef, WeightFile, map_tensors, references
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.families.tensors import Source
from ojfa_export.models.precision import Precision
from ojfa_export.system.atomic import write_atomically

ExitHead = FoldedHead | Shortcut | MlpShortcut | BlockShortcut
# Weights of an exit head that have a row, or a number, for each token.
OF_VOCABULARY = frozenset(
    {"vocabulary.bias", *(name + end for name in ("head", "vocabulary") for end in ("", *ENDS))}
)


class DraftTensors(NamedTuple):
    """Tensors of a draft layer that its graphs don't refer to.

    Attributes:
        cos: Cosines [positions, head_dim/2] that the layer's `rotary_cos` are rows of.
        sin: Sines, the same.
        tokens: Ids [D] int32 of the tokens that it drafts, or None for all.
    """

    cos: TensorRef
    sin: TensorRef
    tokens: TensorRef | None


class Fitter(Protocol):
    """Quantises matrices by what goes into them, in the order in which they run.

    Reading gives a tensor by name, or KeyError.
    """

    def block(self, index: int, read: Callable[[str], NDArray[Any]]) -> dict[str, QuantisedMatrix]:
        """The matrices of the next block, by name."""
        ...

    def skip(self, index: int) -> None:
        """Goes on behind the next block, whose graph is there already."""
        ...

    def head(self, read: Callable[[str], NDArray[Any]]) -> InputFactor:
        """What is known of the head's inputs, after the last block."""
        ...


class Exporter:
    """Writes the graphs of one checkpoint into a directory.

    A graph file appears after its weights and whole, so that one that exists is finished: an
    interrupted export goes on where it stopped.

    Args:
        checkpoint: What to export.
        directory: The bundle's graphs directory.
        precision: Of weight matrices and matrix products.
        max_length: Positions that the rotary tables cover.
        quantiser: Of blocks' matrices and of heads to the vocabulary; None keeps them as precision
            says. Embeddings, norms, biases and shortcuts are never quantised.
        kept: Those that the checkpoint has quantised, in place of a quantiser.

    Attributes:
        fitter: Fits quantised matrices to text, to be set before the first block; without it each
            weight is rounded to the nearest number.
    """

    fitter: Fitter | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: Path,
        precision: Precision,
        max_length: int,
        quantiser: Quantiser | None = None,
        kept: KeptWeights | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.directory = directory
        self.precision = precision
        self.max_length = max_length
        self.quantiser = quantiser
        self.kept = kept
        maker = quantiser or kept
        self.dialect = Portable(checkpoint.spec, precision, None if maker is None else maker.form)

    def embed(self) -> None:
        """Exports the embedding, and the tables of rotations."""
        if self._finished("embed"):
            return
        with WeightFile(self.directory, "embed.bin", self.precision) as file:
            ends = self._ends()
            weights = {
                name: file.add(name, self.checkpoint.read(ends[name]))
                for name in ("token_embedding", "position_embedding")
                if name in ends
            }
        weights |= self._rotary_tables()
        self._write("embed", embed_graph(self.checkpoint.spec, weights, self.max_length))

    def block(self, index: int) -> None:
        """Exports one block."""
        name, checkpoint = block_name(index), self.checkpoint
        if self._finished(name):
            if self.fitter is not None:
                self.fitter.skip(index)
            return
        sources = checkpoint.family.block(checkpoint.config, checkpoint.spec, index)

        def read(key: str) -> NDArray[Any]:
            return checkpoint.read(sources[key])

        fitted = {} if self.fitter is None else self.fitter.block(index, read)
        with WeightFile(self.directory, f"{name}.bin", self.precision) as file:
            weights: dict[str, TensorRef] = {}
            for key, source in sources.items():
                matrix = fitted.get(key) or self._matrix(name, key, source)
                if matrix is not None:
                    weights |= add_matrix(file, key, matrix)
                else:
                    weights[key] = self._add_plain(file, key, source)
        self._write(name, block_graph(checkpoint.spec, index, weights, self.dialect))

    def _matrix(self, graph: str, key: str, source: Source) -> QuantisedMatrix | None:
        """A block's matrix as it is quantised; None where it isn't."""
        if key not in BLOCK_MATRICES:
            return None
        if self.kept is not None:
            return self.kept.matrix(graph, key, source)
        if self.quantiser is not None:
            return self.quantiser.make(self.checkpoint.read(source))
        return None

    def _add_plain(self, file: WeightFile, key: str, source: Source) -> TensorRef:
        """Adds a weight as precision says; one that was quantised must stay what it was."""
        array = self.checkpoint.read(source)
        if array.ndim > 1 and self.checkpoint.has_quantised(source):
            check_exact(key, array, self.precision)
        return file.add(key, array)

    def final_head(self) -> None:
        """Exports final norm and LM head.

        A tied head refers to the embedding's file; quantised, it has numbers of its own, and the
        embedding, of which a token reads one row, stays as it is.
        """
        if self._finished("final_head"):
            return
        sources, tied = self._ends(), self.checkpoint.spec.tied_head
        weights: dict[str, TensorRef] = {}
        with WeightFile(self.directory, "final_head.bin", self.precision) as file:
            for name in ("final_norm.weight", "final_norm.bias"):
                if name in sources:
                    weights[name] = file.add(name, self.checkpoint.read(sources[name]))
            source = sources["token_embedding" if tied else "head"]
            matrix = self._head_matrix(source, sources)
            if matrix is not None:
                weights |= add_matrix(file, "head", matrix)
            elif not tied:
                weights["head"] = self._add_plain(file, "head", source)
        if tied and matrix is None:
            weights["head"] = self._embedding_ref()
        self._write("final_head", final_head_graph(self.checkpoint.spec, weights, self.dialect))

    def _head_matrix(self, source: Source, sources: Mapping[str, Source]) -> QuantisedMatrix | None:
        """The head as it is quantised; None where it isn't."""
        if self.kept is not None:
            return self.kept.matrix("final_head", "head", source)
        if self.quantiser is None:
            return None
        factor = None
        if self.fitter is not None:
            factor = self.fitter.head(lambda key: self.checkpoint.read(sources[key]))
        return self.quantiser.make(self.checkpoint.read(source).T, factor)

    def shortcut(self, head: ExitHead) -> None:
        """Exports the exit head: a narrow shortcut folded, or another as it is; or its blocks.

        Of another the final head must have been exported: its weights are shared.
        """
        if isinstance(head, BlockShortcut):
            self._exit_blocks(head)
            return
        if isinstance(head, FoldedHead):
            weights = self._folded_head(head)
        else:
            jump = self._mlp(head) if isinstance(head, MlpShortcut) else self._residual(head)
            weights = jump | references(self._load("final_head"))
        model = jump_head_graph(self.checkpoint.spec, weights, self.dialect)
        self._write("exit_head", model)

    def check_head(self, tokens: Int32, head: str = "exit_head") -> TensorRef:
        """Exports the exit head over some tokens; the exit head must have been exported.

        Rows of its matrix to the vocabulary are copied as they are stored, quantised ones too; all
        else is shared with it.

        Args:
            tokens: Ids [n], rising.
            head: Graph of the exit head; where blocks stand behind exits, the model's own.

        Returns:
            Where the ids are.
        """
        whole = self._load(head)
        weights, arrays = references(whole), map_tensors(whole, self.directory)
        with WeightFile(self.directory, f"{CHECK_HEAD}.bin", self.precision) as file:
            for name in sorted(OF_VOCABULARY & weights.keys()):
                weights[name] = file.add_as_stored(arrays[name][tokens], weights[name].dtype)
            ids = file.add_integers(tokens)
        spec = self.checkpoint.spec.with_vocabulary(len(tokens))
        self._write(CHECK_HEAD, jump_head_graph(spec, weights, self.dialect, CHECK_HEAD))
        return ids

    def head_rows(self, tokens: Int32) -> NDArray[np.float32]:
        """Rows [n, H] of the model's head, which must have been exported, as they are stored.

        Args:
            tokens: Ids [n].
        """
        whole = self._load("final_head")
        return map_tensors(whole, self.directory)["head"][tokens].astype(np.float32)

    def draft(self, shortcut: DraftShortcut) -> DraftTensors:
        """Exports a draft layer; embedding and final head must have been exported.

        Returns:
            Where the tables of its rotations are, and its tokens.
        """
        spec = shortcut.spec_within(self.checkpoint.spec)
        dialect = Portable(spec, self.precision)
        with WeightFile(self.directory, "draft.bin", self.precision) as file:
            cos, sin = rotations(shortcut.rope_theta, shortcut.head_dim, 0, self.max_length)
            tables = file.add("rotary_cos", cos, "fp32"), file.add("rotary_sin", sin, "fp32")
            weights = self._draft_weights(shortcut, file)
        for name in DRAFT_GRAPHS:
            self._write(name, draft_part_graph(name, spec, weights[name], dialect))
        tokens = None
        if shortcut.tokens is not None:
            with WeightFile(self.directory, "draft_tokens.bin", self.precision) as file:
                tokens = file.add_integers(shortcut.tokens)
        return DraftTensors(*tables, tokens)

    def _draft_weights(self, shortcut: DraftShortcut, file: WeightFile) -> dict[str, Weights]:
        arrays = {
            "embedding.norm.weight": shortcut.embedding_norm,
            "attention.norm.weight": shortcut.state_norm,
            "attention.qkv.weight": shortcut.qkv,
            "attention.out.weight": shortcut.out,
            "mlp.norm.weight": shortcut.mlp_norm,
            "mlp.up.weight": shortcut.up,
            "mlp.down.weight": shortcut.down,
        }
        if shortcut.head is None:
            head = references(self._load("final_head"))["head"]
        else:
            head = file.add("head", shortcut.head)
        norm = file.add("final_norm.weight", shortcut.final_norm)
        return {
            "draft_memory": {"fuse.weight": file.add("fuse.weight", shortcut.fuse)},
            "draft": {"token_embedding": self._embedding_ref()}
            | {name: file.add(name, array) for name, array in arrays.items()},
            "draft_head": {"final_norm.weight": norm, "head": head},
        }

    def _folded_head(self, folded: FoldedHead) -> dict[str, TensorRef]:
        with WeightFile(self.directory, "exit_head.bin", self.precision) as file:
            weights = {
                "project": file.add("project", folded.project, "fp32"),
                "project.bias": file.add("project.bias", folded.bias),
                **self._vocabulary(file, "vocabulary", folded.weight),
            }
            if folded.logit_bias is not None:
                weights["vocabulary.bias"] = file.add("vocabulary.bias", folded.logit_bias)
        return weights

    def _vocabulary(
        self, file: WeightFile, name: str, matrix: NDArray[Any]
    ) -> dict[str, TensorRef]:
        """Adds an exit head's matrix [V, features], quantised where its features are whole groups.

        One of a checkpoint that is quantised already stays as precision says, and so does one
        beside 16 bits: it is narrow, and a GPU's checks read it as it is.
        """
        takes = self.quantiser is not None and self.quantiser.takes(matrix.shape[1])
        if self.quantiser is None or not takes or self.precision != "fp32":
            return {name: file.add(name, matrix)}
        return add_matrix(file, name, self.quantiser.make(matrix.T))

    def _mlp(self, shortcut: MlpShortcut) -> dict[str, TensorRef]:
        with WeightFile(self.directory, "exit_head.bin", self.precision) as file:
            return {
                "exit.scale": file.add("exit.scale", shortcut.scale, "fp32"),
                "exit.bias": file.add("exit.bias", shortcut.biases(), "fp32"),
                "mlp.up.weight": file.add("mlp.up.weight", shortcut.up),
                "mlp.down.weight": file.add("mlp.down.weight", shortcut.down),
            }

    def _residual(self, shortcut: Shortcut) -> dict[str, TensorRef]:
        gates = shortcut.gates
        if gates is None:
            gates = np.ones(self.checkpoint.spec.blocks - 1, np.float32)
        down = shortcut.down.astype(np.float64)
        with WeightFile(self.directory, "exit_head.bin", "fp32") as file:
            return {
                "project": file.add("project", shortcut.scale[:, None] * down),
                "project.bias": file.add("project.bias", shortcut.shift @ down),
                "up": file.add("up", shortcut.up),
                "gates": file.add("gates", gates),
            }

    def _exit_blocks(self, shortcut: BlockShortcut) -> None:
        """Scales and shifts are in the first block's file, for all of them."""
        exits: dict[str, TensorRef] = {}
        for index in range(shortcut.blocks):
            name = exit_block_name(index)
            with WeightFile(self.directory, f"{name}.bin", self.precision) as file:
                if not index:
                    exits = {
                        "exit.scale": file.add("exit.scale", shortcut.scale, "fp32"),
                        "exit.shift": file.add("exit.shift", shortcut.shift, "fp32"),
                    }
                weights = {
                    key: file.add(key, each[index]) for key, each in shortcut.weights.items()
                }
            spec, dialect = self.checkpoint.spec, self.dialect
            self._write(name, exit_block_graph(spec, name, weights | exits, dialect))

    def _ends(self) -> Mapping[str, Source]:
        return self.checkpoint.family.ends(self.checkpoint.config, self.checkpoint.spec)

    def _rotary_tables(self) -> Weights:
        rotary = self.checkpoint.family.rotary(self.checkpoint.config)
        if rotary is None:
            return {}
        with WeightFile(self.directory, "rotary.bin", "fp32") as file:
            cos, sin = rotary.tables(self.max_length)
            return {
                "rotary_cos": file.add("rotary_cos", cos),
                "rotary_sin": file.add("rotary_sin", sin),
            }

    def _embedding_ref(self) -> TensorRef:
        return references(self._load("embed"))["token_embedding"]

    def _load(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.directory / f"{name}.onnx", load_external_data=False)

    def _finished(self, name: str) -> bool:
        return (self.directory / f"{name}.onnx").exists()

    def _write(self, name: str, model: onnx.ModelProto) -> None:
        data = model.SerializeToString(deterministic=True)
        write_atomically(self.directory / f"{name}.onnx", data)
