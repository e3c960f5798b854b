"""Reading pytorch_model.bin, only through torch's weights-only loading: a pickle can run code."""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ojfa_export.errors import CheckpointError
from ojfa_export.system.files import check_regular

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def read_torch_file(path: Path) -> dict[str, NDArray[Any]]:
    """Maps a torch file's tensors into memory.

    Args:
        path: A pytorch_model.bin or one of its shards.

    Returns:
        Arrays by name, backed by the file where its format allows; bf16 as ml_dtypes.bfloat16.

    Raises:
        CheckpointError: torch is not installed, or the file holds more than weights.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read: {error}", hint="download the checkpoint again"
        ) from error
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} can only be read with torch, which is not installed",
            hint="pip install 'ojfa-export[verify]', or convert the checkpoint to safetensors",
        ) from error
    try:
        # Files from before torch 1.6 are no zip archives, and can't be mapped.
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever the damaged bytes lead its reader to
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} can't be loaded as weights only: {first}",
            hint="it is damaged, or would run code on loading; use a safetensors checkpoint",
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(
            f"{path} holds a {type(tensors).__name__}, not tensors by name",
            hint="it is no checkpoint of transformers; use a safetensors checkpoint",
        )
    return {
        name: _to_numpy(tensor, f"tensor '{name}' in {path}")
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def _to_numpy(tensor: torch.Tensor, where: str) -> NDArray[Any]:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16 and tensor.layout == torch.strided:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    try:
        return np.asarray(tensor.numpy())
    except (TypeError, RuntimeError) as error:  # a dtype or a layout that NumPy lacks
        raise CheckpointError(
            f"{where} has dtype {tensor.dtype}, which is not supported",
            hint="save the checkpoint as safetensors, or dequantised",
        ) from error
