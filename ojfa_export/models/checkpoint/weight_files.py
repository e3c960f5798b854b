"""Which files of a checkpoint directory hold its tensors: the ones that transformers takes."""

from __future__ import annotations

import json
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
from ojfa_export.models.checkpoint.torch_file import read_torch_file
from ojfa_export.system.files import check_regular

Array = NDArray[Any]

DTYPES: Mapping[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
}
# Beside these, of quantised matrices.
STORED: Mapping[str, Any] = {
    **DTYPES,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
# In transformers' order: what comes first is taken, however new the others are.
_PREFERRED = ("model.safetensors", "pytorch_model.bin")


def find_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor.

    A whole file goes before an index of shards, safetensors before torch's files. Of shards all
    tensors count, whether the index names them or not, the last shard's first.

    Raises:
        CheckpointError: There are no weights, or those that transformers takes are damaged.
    """
    for name in _PREFERRED:
        whole, index = directory / name, directory / f"{name}.index.json"
        if whole.exists():
            return dict.fromkeys(tensor_names(whole), whole)
        if index.exists():
            return _sharded(directory, index)
    raise CheckpointError(
        f"{directory} holds no model.safetensors or pytorch_model.bin",
        hint="name a directory with the model's weights",
    )


def _sharded(directory: Path, index: Path) -> dict[str, Path]:
    weight_map = read_fields(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(
            f"{index} has no 'weight_map' from tensors to files",
            hint="download the checkpoint again",
        )
    named = {name: directory / Path(shard).name for name, shard in weight_map.items()}
    files: dict[str, Path] = {}
    for path in sorted(set(named.values())):
        if not path.is_file():
            raise CheckpointError(
                f"shard {path} is missing, but {index.name} names it",
                hint="download the checkpoint again",
            )
        # Opened now: a truncated one is refused before anything is written.
        found = tensor_names(path)
        if missing := {name for name, shard in named.items() if shard == path} - set(found):
            raise CheckpointError(
                f"shard {path} lacks tensor '{min(missing)}', which {index.name} says it holds",
                hint="download the checkpoint again",
            )
        files |= dict.fromkeys(found, path)
    return files


def tensor_names(path: Path) -> list[str]:
    """The tensors of a file.

    Raises:
        CheckpointError: It can't be read.
    """
    if path.suffix == ".bin":
        return list(read_torch_file(path))
    with _opened(path) as file:
        return list(file.keys())


def read_headers(path: Path, names: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of a file's tensors; raises as `tensor_names`."""
    if path.suffix == ".bin":
        tensors = read_torch_file(path)
        return {name: (tensors[name].shape, _dtype_name(tensors[name])) for name in names}
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in names}
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def read_tensor(path: Path, name: str) -> Array:
    """A tensor in the dtype that it is stored in.

    Raises:
        CheckpointError: It can't be read, or its dtype is not supported.
    """
    if path.suffix == ".bin":
        array = read_torch_file(path)[name]
        check_dtype(name, path, _dtype_name(array))
        return array
    # Opened for each tensor: pages of a file that stays mapped stay in memory.
    with _opened(path) as file:
        check_dtype(name, path, file.get_slice(name).get_dtype())
        tensor: Array = file.get_tensor(name)
        return tensor


def read_stored(path: Path, name: str) -> Array:
    """A tensor of a quantised matrix as it is stored, whole numbers and 8-bit floats too.

    Raises:
        CheckpointError: It can't be read.
    """
    if path.suffix == ".bin":
        return read_torch_file(path)[name]
    with _opened(path) as file:  # which has looked at the header
        view = file.get_slice(name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if not dtype.startswith("F8"):
            tensor: Array = file.get_tensor(name)
            return tensor
    stored: Array = np.frombuffer(_read_bytes(path, name), STORED[dtype])
    return stored.reshape(shape)


def _read_bytes(path: Path, name: str) -> bytes:
    """A tensor's bytes, of a dtype that safetensors has no NumPy array for."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, stop = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return file.read(int(stop) - int(start))


def read_integers(path: Path, name: str) -> Array:
    """A tensor of whole numbers, int64.

    Raises:
        CheckpointError: It can't be read, or holds something else.
    """
    if path.suffix == ".bin":
        array = read_torch_file(path)[name]
    else:
        with _opened(path) as file:
            array = file.get_tensor(name)
    if array.dtype.kind != "i":
        raise CheckpointError(
            f"tensor '{name}' in {path} has dtype {array.dtype}, expected whole numbers",
            hint="download the checkpoint again",
        )
    return array.astype(np.int64)


def check_dtype(name: str, path: Path, dtype: str) -> None:
    """Refuses what is no float.

    Raises:
        CheckpointError: It names the tensor.
    """
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensor '{name}' in {path} has dtype {dtype}, which is not supported",
            hint=f"supported: {', '.join(DTYPES)}; what is quantised needs its scales "
            "beside it (docs/weights.md), or to be dequantised first",
        )


def _dtype_name(array: Array) -> str:
    """As safetensors names it, where it is supported."""
    return next((name for name in STORED if array.dtype == STORED[name]), str(array.dtype))


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
