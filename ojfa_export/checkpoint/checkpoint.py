"""A checkpoint directory: config and tensors, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ojfa_export.checkpoint.tokenizer import eos_token_ids
from ojfa_export.checkpoint.torch_file import read_torch_file
from ojfa_export.digest import sha256_file
from ojfa_export.errors import CheckpointError
from ojfa_export.families import read_spec
from ojfa_export.families.config import Config
from ojfa_export.families.tensors import Source
from ojfa_export.paths import check_utf8

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
        self.config = Config(_read_json(directory / "config.json"), str(directory / "config.json"))
        self.family, spec = read_spec(self.config)
        eos = eos_token_ids(directory, spec.eos_token_ids)
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

    def check_shapes(self) -> None:
        """Checks from the files' headers that every tensor is there with the right shape.

        Raises:
            CheckpointError: Naming the first that isn't.
        """
        block = self.family.block
        sources = [*self.family.ends(self.config, self.spec).values()]
        for index in range(self.spec.blocks):
            sources += block(self.config, self.spec, index).values()
        wanted = {
            self._stored_name(name): source.stored_shape(size)
            for source in sources
            for name, size in source.parts
        }
        for path in self.weight_files:
            names = [name for name in wanted if self._files[name] == path]
            for name, shape in _stored_shapes(path, names).items():
                self._check_shape(name, shape, wanted[name])

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
            return read_torch_file(path)[name]
        try:
            # Opened for each tensor: pages of a file that stays mapped stay in memory.
            with safe_open(path, framework="numpy") as file:
                return _slice_to_array(file, path, name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} can't be read: {error}",
                hint="the file is missing, truncated or damaged; download it again",
            ) from error


def _stored_shapes(path: Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".bin":
        tensors = read_torch_file(path)
        return {name: tensors[name].shape for name in names}
    with safe_open(path, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _slice_to_array(file: Any, path: Path, name: str) -> Array:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{name}' in {path} has dtype {dtype}, which is not supported",
            hint=f"supported: {', '.join(DTYPES)}; quantised checkpoints must be dequantised first",
        )
    array: Array = file.get_tensor(name)
    return array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {path.name}",
            hint="name a Hugging Face model directory or a hub id",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} can't be read: {error}", hint="download the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object", hint="download the checkpoint again"
        )
    return value


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).exists():
            weight_map = _read_json(directory / index).get("weight_map")
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
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read: {error}",
            hint="the file is truncated or damaged; download it again",
        ) from error
