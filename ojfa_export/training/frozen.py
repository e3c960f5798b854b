"""The model whose exits are trained: transformers' own, frozen, on the CPU or a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ojfa_export.errors import CheckpointError, UsageError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.quiet import quiet_transformers
from ojfa_export.models.families.tensors import Source


@dataclass(frozen=True)
class States:
    """What the frozen model computed of a batch of windows.

    Attributes:
        ids: [B, T] int64, the tokens.
        hidden: For exits 1..L-1, the output [B, T, H] of that many blocks, in the model's dtype.
        last: [B, T, H], the last block's output behind the final norm.
    """

    ids: Tensor
    hidden: tuple[Tensor, ...]
    last: Tensor

    def at(self, exit: int, tokens: Tensor) -> Tensor:
        """Hidden states [n, H] fp32 of some tokens, counted through the batch, at an exit."""
        hidden = self.hidden[exit - 1]
        return hidden.reshape(-1, hidden.shape[-1])[tokens].float()


def choose_device(asked: str | None) -> torch.device:
    """The device that was asked for, else CUDA where there is one.

    Raises:
        UsageError: CUDA was asked for, and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device 'cuda' was asked for, but torch finds no CUDA device here",
            hint="leave --device out, or see 'nvidia-smi' and the installed torch",
        )
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def precision(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Frozen:
    """A model that learns nothing: hidden states, and logits of any hidden state.

    The final norm is read from the checkpoint as a bundle's head has it, so that a jump is trained
    for the very head that will follow it; the LM head is the loaded model's, which is not kept
    twice.

    Args:
        checkpoint: Of a family without quirks of its own: final norm, LM head, nothing else.
        device: Where it runs.

    Raises:
        CheckpointError: transformers can't load it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.spec, self.device = checkpoint.spec, device
        self._where = checkpoint.directory
        self.dtype = precision(device)
        self.model: Any = _load(checkpoint, self.dtype).to(device)
        ends = checkpoint.family.ends(checkpoint.config, checkpoint.spec)

        def vector(source: Source | None) -> Tensor | None:
            if source is None:
                return None
            return torch.tensor(checkpoint.read(source).astype(np.float32), device=device)

        self._norm_weight = vector(ends["final_norm.weight"])
        self._norm_bias = vector(ends.get("final_norm.bias"))
        self._head = self.model.get_output_embeddings()

    @property
    def exits(self) -> int:
        """L-1."""
        return self.spec.blocks - 1

    @property
    def memory_left(self) -> int | None:
        """Bytes of the GPU that the weights leave; None on the CPU."""
        if self.device.type != "cuda":
            return None
        weights = sum(each.nbytes for each in self.model.parameters())
        total = int(torch.cuda.get_device_properties(self.device).total_memory)
        return max(1, total - int(weights))

    @torch.no_grad()
    def states(self, ids: Tensor) -> States:
        """Runs windows [B, T] of token ids through all blocks."""
        ids = ids.to(self.device)
        out = self.model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return States(ids, tuple(out.hidden_states[1:-1]), out.last_hidden_state)

    @torch.no_grad()
    def full_log_probs(self, normed: Tensor) -> Tensor:
        """The full model's log probabilities [n, V] fp32, of hidden states behind the final norm.

        Raises:
            CheckpointError: They are NaN or infinite.
        """
        logits = self.full_logits(normed).float()
        self.check_finite(torch.isfinite(logits).all())
        return functional.log_softmax(logits, -1)

    @torch.no_grad()
    def full_logits(self, normed: Tensor) -> Tensor:
        """The full model's logits [n, V] in its dtype, of hidden states behind the final norm."""
        logits: Tensor = self._head(normed)
        return logits

    def check_finite(self, finite: Tensor) -> None:
        """Refuses a model whose logits are not finite.

        Args:
            finite: Whether they are.

        Raises:
            CheckpointError: They are NaN or infinite.
        """
        if not finite:
            raise CheckpointError(
                f"the model of {self._where} gives logits that are NaN or infinite on this text",
                hint="its weights are damaged, or it overflows; run it with transformers to see",
            )

    def log_probs(self, y: Tensor) -> Tensor:
        """Log probabilities [n, V] fp32 that norm and head make of hidden states [n, H] fp32."""
        shape, eps = (y.shape[-1],), self.spec.norm_epsilon
        if self.spec.norm == "layer":
            normed = functional.layer_norm(y, shape, self._norm_weight, self._norm_bias, eps)
        else:
            normed = functional.rms_norm(y, shape, self._norm_weight, eps)
        return functional.log_softmax(self._head(normed.to(self.dtype)).float(), -1)


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                os.fspath(checkpoint.directory), local_files_only=True, dtype=dtype
            )
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"transformers can't load {checkpoint.directory}: {str(error).splitlines()[0]}",
            hint="check the checkpoint with 'ojfa-export verify', or install a newer transformers",
        ) from error
    return model.eval().requires_grad_(False)
