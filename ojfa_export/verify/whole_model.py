"""A checkpoint's model whole in transformers, as `from_pretrained` gives it.

Where its weights are quantised, layers are plain ones: fp8 is dequantised by transformers itself,
whose other readers want kernels of a GPU, so that it is given what the numbers stand for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.families.config import QUANTISATION

if TYPE_CHECKING:
    import torch

# Methods that transformers dequantises without a kernel.
_BY_ITSELF = ("fp8",)


def load_whole(
    checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Any:
    """Loads a checkpoint's model.

    Args:
        checkpoint: The checkpoint.
        dtype: Of its parameters.
        trust_remote_code: Whether transformers may run code that lies in the checkpoint.

    Raises:
        Exception: Whatever transformers raises where it can't.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = os.fspath(checkpoint.directory)
    found: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if checkpoint.layout is None:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **found).eval()
    config = AutoConfig.from_pretrained(directory, **found)
    method = getattr(config, QUANTISATION)["quant_method"]
    if method in _BY_ITSELF:
        getattr(config, QUANTISATION)["dequantize"] = True
        whole = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, **found)
        return whole.eval()
    delattr(config, QUANTISATION)
    return _of_plain_tensors(checkpoint, config, dtype, trust_remote_code=trust_remote_code)


def _of_plain_tensors(
    checkpoint: Checkpoint, config: Any, dtype: torch.dtype, *, trust_remote_code: bool
) -> Any:
    """The model of a config, given the dequantised tensors of a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    state = {}
    for name, read in checkpoint.plain_tensors():
        array = np.ascontiguousarray(read(), np.float32)
        state[name] = torch.from_numpy(array).to(dtype)
    with torch.device("meta"):  # for its class, which takes tensors by the names that files have
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(
            os.fspath(checkpoint.directory), local_files_only=True
        )
    return model.eval()
