"""A checkpoint directory: config and tensors, read one at a time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.fields import read_fields
from ojfa_export.models.checkpoint.generation import read_generation
from ojfa_export.models.checkpoint.quantised import read_layout
from ojfa_export.models.checkpoint.quantised.kept import Kept, Scaled, beside
from ojfa_export.models.checkpoint.quantised.layout import WEIGHT, MatrixTensors
from ojfa_export.models.checkpoint.weight_files import (
    Array,
    check_dtype,
    find_tensors,
    read_headers,
    read_tensor,
)
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import QUANTISATION, Config
from ojfa_export.models.families.tensors import HEAD, HEAD_NAMES, Source, by_kind
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.digest import sha256_file
from ojfa_export.system.paths import check_utf8

# What ends the names of quantised numbers.
_NUMBERS = (".qweight", ".weight_packed")


class Checkpoint:
    """A Hugging Face checkpoint directory.

    Args:
        directory: Holds config.json and safetensors files (or pytorch_model.bin).
        ignored_fields: Fields of config.json and generation_config.json that are not understood,
            or not followed, and that the user goes on without.

    Attributes:
        generation: How text is generated, as the checkpoint says.
        layout: How matrices are quantised; None where they aren't.

    Raises:
        CheckpointError: Where anything is missing, damaged or not supported.
        UsageError: The path is not UTF-8.
    """

    def __init__(self, directory: Path, ignored_fields: Collection[str] = ()) -> None:
        check_utf8(directory)
        self.directory = directory
        path = directory / "config.json"
        self.config = Config(read_fields(path), str(path), ignored_fields)
        self.family, spec = read_spec(self.config)
        eos, self.generation = read_generation(directory, self.config, spec.vocab_size)
        self.layout = read_layout(self.config)
        self._files = find_tensors(directory)
        # A tensor that another one serves for.
        self._same: dict[str, str] = {}
        tied = spec.tied_head and self._is_tied(spec)
        self.spec = spec.model_copy(update={"eos_token_ids": eos, "tied_head": tied})

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold tensors, each once, in order."""
        return sorted(set(self._files.values()))

    def sha256(self) -> str:
        """Digest of config and weights: the identity of the model."""
        digest = hashlib.sha256()
        for path in [self.directory / "config.json", *self.weight_files]:
            digest.update(bytes.fromhex(sha256_file(path)))
        return digest.hexdigest()

    def read(self, source: Source) -> Array:
        """Reads a weight as the graphs want it.

        Returns:
            [inputs, outputs] for a matrix, [size] for a vector, in the checkpoint's own dtype; a
            quantised matrix dequantised, in float32.

        Raises:
            CheckpointError: Missing, of another shape, or with NaN or infinity.
        """
        return source.join([self._part(source, name, size) for name, size in source.parts])

    def kept(self, source: Source) -> Kept | Scaled | None:
        """The numbers of a quantised weight as they are, [outputs, inputs].

        Returns:
            None where it isn't quantised, in parts that can be put together.

        Raises:
            CheckpointError: As `read`; the numbers themselves are read later.
        """
        parts = []
        for name, size in source.parts:
            stored = self._stored_name(name)
            if source.inputs is None or not self.is_quantised(stored):
                return None
            part = self._quantised(source, stored, size)
            if source.heads:
                part = part.outputs_at(by_kind(source.linear_shape(size)[0], source.heads))
            parts.append(part.times(source.scale))
        return beside(parts)

    def is_quantised(self, stored: str) -> bool:
        """Whether a tensor, by its name in the files, is what a quantised matrix stands for."""
        if self.layout is None or not stored.endswith(WEIGHT):
            return False
        return self.layout.holds(stored.removesuffix(WEIGHT), self._files)

    def has_quantised(self, source: Source) -> bool:
        """Whether a matrix, or a part of it, is quantised."""
        names = (self._stored_name(name) for name, _ in source.parts)
        return source.inputs is not None and any(map(self.is_quantised, names))

    def plain_tensors(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """The model's tensors as a checkpoint that isn't quantised would have them.

        Yields:
            The name of each in the files, and what reads it; quantised ones dequantised in float32.
        """
        for source in self._sources():
            for part, size in source.parts:
                read = functools.partial(self._part, source, part, size)
                yield self._stored_name(part), read

    def check_vocabulary(self, highest: int) -> None:
        """Refuses tokens that the model doesn't have.

        Args:
            highest: The largest id that its tokenizer gave.

        Raises:
            CheckpointError: The model has fewer.
        """
        vocabulary = self.spec.vocab_size
        if highest >= vocabulary:
            raise CheckpointError(
                f"the tokenizer of {self.directory} gives token {highest}, but the "
                f"model has {vocabulary} tokens",
                hint="tokenizer and weights belong to different models",
            )

    def check_tensors(self) -> None:
        """Checks from the files' headers that every tensor is there with the right shape and dtype.

        Raises:
            CheckpointError: Naming the first that isn't.
        """
        wanted: dict[Path, dict[str, tuple[int, ...]]] = {}
        for source in self._sources():
            for part, size in source.parts:
                name = self._stored_name(part)
                if source.inputs is not None and self.is_quantised(name):
                    self._quantised(source, name, size)
                    continue
                wanted.setdefault(self._files[name], {})[name] = source.stored_shape(size)
        for path, shapes in sorted(wanted.items()):
            for name, (shape, dtype) in read_headers(path, list(shapes)).items():
                check_dtype(name, path, dtype)
                self._check_shape(name, shape, shapes[name])

    def _sources(self) -> Iterator[Source]:
        """Every weight of the model; block by block, so that the first missing one ends it."""
        yield from self.family.ends(self.config, self.spec).values()
        for index in range(self.spec.blocks):
            yield from self.family.block(self.config, self.spec, index).values()

    def _is_tied(self, spec: ModelSpec) -> bool:
        """Whether embedding and LM head are one, where config.json says so: as transformers has it.

        One that is stored alone serves for both; where both are stored, and differ, each is used.
        """
        source = self.family.ends(self.config, spec)["token_embedding"]
        (embedding, size) = source.parts[0]
        if not any(self._is_there(name) for name in HEAD_NAMES):
            return True
        if not any(self._is_there(name) for name in self._stored_names(embedding)):
            self._same[embedding] = HEAD
            return True
        return np.array_equal(self._part(source, embedding, size), self._part(source, HEAD, size))

    def _check_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise CheckpointError(
                f"tensor '{name}' in {self._files[name]} has shape {list(found)}, "
                f"expected {list(wanted)}",
                hint="config.json and the weights belong to different models, or one is damaged",
            )

    def _part(self, source: Source, name: str, size: int) -> Array:
        stored = self._stored_name(name)
        if source.inputs is not None and self.is_quantised(stored):
            weights = self._quantised(source, stored, size).dequantised()
            return weights if source.transposed or source.table else weights.T
        array = read_tensor(self._files[stored], stored)
        self._check_shape(stored, array.shape, source.stored_shape(size))
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"tensor '{stored}' in {self._files[stored]} holds NaN or infinity",
                hint="the checkpoint is damaged or training diverged; get a sound one",
            )
        return array

    def _quantised(self, source: Source, stored: str, size: int) -> Kept | Scaled:
        """A quantised matrix of the files."""
        assert self.layout is not None
        outputs, inputs = source.linear_shape(size)
        tensors = MatrixTensors(stored.removesuffix(WEIGHT), self._files, self.directory)
        return self.layout.read(tensors, inputs, outputs)

    def _is_there(self, stored: str) -> bool:
        return stored in self._files or self.is_quantised(stored)

    def _stored_name(self, name: str) -> str:
        candidates = self._stored_names(self._same.get(name, name))
        for candidate in candidates:
            if self._is_there(candidate):
                return candidate
        if self.layout is None and any(each.endswith(_NUMBERS) for each in self._files):
            raise CheckpointError(
                f"the weights of {self.directory} are quantised, but its config.json has no "
                f"{QUANTISATION} that says how",
                hint="download the checkpoint again, or write the field into config.json",
            )
        raise CheckpointError(
            f"tensor '{candidates[0]}' is missing in {self.directory}",
            hint="a shard may be missing; download the checkpoint again"
            if name != HEAD
            else "download the checkpoint again; config.json says that the LM head is not the "
            "token embedding (tie_word_embeddings is false)",
        )

    def _stored_names(self, name: str) -> list[str]:
        """The names that a tensor may have in the files."""
        if name == HEAD:
            return list(HEAD_NAMES)
        return [prefix + name for prefix in self.family.prefixes]
