"""A checkpoint directory: config and tensors, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.fields import read_fields
from ojfa_export.models.checkpoint.tokenizer import eos_token_ids
from ojfa_export.models.checkpoint.torch_file import read_torch_file
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.tensors import Source
from ojfa_export.system.digest import sha256_file
from ojfa_export.system.files import check_regular
from ojfa_export.system.paths import check_utf8

Array = NDArray[Any]

DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
}


class Checkpoint:
    """A Hugging Face checkpoint directory.

    Args:
        directory: Holds config.json and safetensors files (or pytorch_model.bin).

    Raises:
        CheckpointError: Where anything is missing, damaged or not supported.
        UsageError: The path is not UTF-8.
    """

    def __init__(self, directory: Path) -> None:
        check_utf8(directory)
        self.directory = directory
        self.config = Config(read_fields(directory / "config.json"), str(directory / "config.json"))
        self.family, spec = read_spec(self.config)
        eos = eos_token_ids(directory, spec.eos_token_ids, spec.vocab_size)
        self.spec = spec.model_copy(update={"eos_token_ids": eos})
        self._files = _tensor_files(directory)

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
            [inputs, outputs] for a matrix, [size] for a vector, in the checkpoint's own dtype.

        Raises:
            CheckpointError: Missing, of another shape, or with NaN or infinity.
        """
        parts = [self._part(name, source.stored_shape(size)) for name, size in source.parts]
        if source.inputs is None:
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if source.transposed:
            parts = [part.T for part in parts]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)

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
                wanted.setdefault(self._files[name], {})[name] = source.stored_shape(size)
        for path, shapes in sorted(wanted.items()):
            for name, (shape, dtype) in _headers(path, list(shapes)).items():
                _check_dtype(name, path, dtype)
                self._check_shape(name, shape, shapes[name])

    def _sources(self) -> Iterator[Source]:
        """Every weight of the model; block by block, so that the first missing one ends it."""
        yield from self.family.ends(self.config, self.spec).values()
        for index in range(self.spec.blocks):
            yield from self.family.block(self.config, self.spec, index).values()

    def _check_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise CheckpointError(
                f"tensor '{name}' in {self._files[name]} has shape {list(found)}, "
                f"expected {list(wanted)}",
                hint="config.json and the weights belong to different models, or one is damaged",
            )

    def _part(self, name: str, shape: tuple[int, ...]) -> Array:
        stored_name = self._stored_name(name)
        array = self._load(stored_name)
        where = f"tensor '{stored_name}' in {self._files[stored_name]}"
        self._check_shape(stored_name, array.shape, shape)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{where} holds NaN or infinity",
                hint="the checkpoint is damaged or training diverged; get a sound one",
            )
        return array

    def _stored_name(self, name: str) -> str:
        for prefix in self.family.prefixes:
            if prefix + name in self._files:
                return prefix + name
        raise CheckpointError(
            f"tensor '{self.family.prefixes[0]}{name}' is missing in {self.directory}",
            hint="a shard may be missing; download the checkpoint again",
        )

    def _load(self, name: str) -> Array:
        path = self._files[name]
        if path.suffix == ".bin":
            array = read_torch_file(path)[name]
            _check_dtype(name, path, _dtype_name(array))
            return array
        # Opened for each tensor: pages of a file that stays mapped stay in memory.
        with _opened(path) as file:
            _check_dtype(name, path, file.get_slice(name).get_dtype())
            tensor: Array = file.get_tensor(name)
            return tensor


def _headers(path: Path, names: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of tensors."""
    if path.suffix == ".bin":
        tensors = read_torch_file(path)
        return {name: (tensors[name].shape, _dtype_name(tensors[name])) for name in names}
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in names}
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _dtype_name(array: Array) -> str:
    """As safetensors names it, where it is supported."""
    return next((name for name in DTYPES if array.dtype == DTYPES[name]), str(array.dtype))


def _check_dtype(name: str, path: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{name}' in {path} has dtype {dtype}, which is not supported",
            hint=f"supported: {', '.join(DTYPES)}; quantised checkpoints must be dequantised first",
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read: {error}",
            hint="the file is missing, truncated or damaged; download it again",
        ) from error


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).exists():
            weight_map = read_fields(directory / index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) for shard in weight_map.values()
            ):
                raise CheckpointError(
                    f"{directory / index} has no 'weight_map' from tensors to files",
                    hint="download the checkpoint again",
                )
            files = {name: directory / Path(shard).name for name, shard in weight_map.items()}
            for path in sorted(set(files.values())):
                if not path.is_file():
                    raise CheckpointError(
                        f"shard {path} is missing, but {index} names it",
                        hint="download the checkpoint again",
                    )
                _check_shard(path, {name for name, shard in files.items() if shard == path}, index)
            return files
    single, torch_file = directory / "model.safetensors", directory / "pytorch_model.bin"
    if single.exists():
        return dict.fromkeys(_tensor_names(single), single)
    if torch_file.exists():
        return dict.fromkeys(read_torch_file(torch_file), torch_file)
    raise CheckpointError(
        f"{directory} holds no model.safetensors or pytorch_model.bin",
        hint="name a directory with the model's weights",
    )


def _check_shard(path: Path, expected: set[str], index: str) -> None:
    """Opens a shard now: a truncated one is refused before anything is written."""
    if missing := expected - set(_tensor_names(path)):
        raise CheckpointError(
            f"shard {path} lacks tensor '{min(missing)}', which {index} says it holds",
            hint="download the checkpoint again",
        )


def _tensor_names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(read_torch_file(path))
    with _opened(path) as file:
        return list(file.keys())
