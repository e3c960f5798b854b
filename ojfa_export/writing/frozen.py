"""The model whose exits are trained: transformers' own, frozen, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ojfa_export.errors import CheckpointError, UsageError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.quiet import quiet_transformers
from ojfa_export.models.families.tensors import Source
from ojfa_export.verify.reference import decoder_layers
from ojfa_export.verify.whole_model import load_whole

# Arguments of a block by position and by name, but for hidden states, which come first.
Beside = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class States:
    """What the frozen model computed of a batch of windows.

    Attributes:
        embedded: [B, T, H], the tokens' embeddings, without positions, in the model's dtype.
        hidden: The outputs [B, T, H] of 1..L blocks, before the final norm, in the model's dtype.
        last: [B, T, H], the last block's output behind transformers' final norm.
        beside: What the model gave its last block beside hidden states: mask, positions.
    """

    embedded: Tensor
    hidden: tuple[Tensor, ...]
    last: Tensor
    beside: Beside

    def at(self, blocks: int, tokens: Tensor) -> Tensor:
        """Hidden states [n, H] fp32 of some tokens, counted through the batch, after blocks."""
        return pick(self.hidden[blocks - 1], tokens)


def pick(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Rows [n, H] fp32 of [B, T, H], counted through the batch."""
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
        checkpoint: Of any family that ends with final norm and LM head. Factors that its graphs
            have in their weights (`Source.scale`) are in the embeddings and logits here too.
        device: Where it runs.
        dtype: Of weights and hidden states; None for `precision`.

    Raises:
        CheckpointError: transformers can't load it.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.spec, self.device, self.checkpoint = checkpoint.spec, device, checkpoint
        self.rotary = checkpoint.family.rotary(checkpoint.config)
        self.dtype = dtype or precision(device)
        self.model: Any = _load(checkpoint, self.dtype).to(device)
        self.last_layer: torch.nn.Module = decoder_layers(self.model)[-1]
        ends = checkpoint.family.ends(checkpoint.config, checkpoint.spec)
        head = ends.get("head", ends["token_embedding"])
        self._embedding_scale = ends["token_embedding"].scale
        self.head: Any = _scaled(self.model.get_output_embeddings(), head.scale)
        self._norm_scale = ends["final_norm.weight"].scale

        def vector(name: str) -> Tensor | None:
            return torch.from_numpy(self._read(ends[name])).to(device) if name in ends else None

        self._norm_weight = vector("final_norm.weight")
        self._norm_bias = vector("final_norm.bias")

    @property
    def norm_weight(self) -> Tensor:
        """Of the final norm: [H] fp32."""
        assert self._norm_weight is not None
        return self._norm_weight

    def last_block(self) -> dict[str, NDArray[np.float32]]:
        """The last block's weights, as the checkpoint has them, by the names of `graphs.block`."""
        read, index = self.checkpoint, self.spec.blocks - 1
        sources = read.family.block(read.config, self.spec, index)
        return {name: self._read(source) for name, source in sources.items()}

    def _read(self, source: Source) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.checkpoint.read(source), np.float32)

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
        ids, seen = ids.to(self.device), _Seen()
        with seen.watch(self.last_layer):
            out = self.model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False)
        hidden = (*out.hidden_states[1:-1], seen.output)
        # Some models' own embedding multiplies too, and others multiply what it gives.
        embedded = functional.embedding(ids, self.model.get_input_embeddings().weight)
        scale = self._embedding_scale
        return States(
            embedded if scale == 1 else embedded * scale, hidden, out.last_hidden_state, seen.beside
        )

    @torch.no_grad()
    def full_log_probs(self, normed: Tensor) -> Tensor:
        """The full model's log probabilities [n, V] fp32, of `States.last`.

        Raises:
            CheckpointError: They are NaN or infinite.
        """
        logits = self.full_logits(normed).float()
        self.check_finite(torch.isfinite(logits).all())
        return functional.log_softmax(logits, -1)

    @torch.no_grad()
    def full_logits(self, normed: Tensor) -> Tensor:
        """The full model's logits [n, V] in its dtype, of `States.last`."""
        logits: Tensor = self.head(normed)
        return self._softcapped(logits if self._norm_scale == 1 else logits * self._norm_scale)

    def _softcapped(self, logits: Tensor) -> Tensor:
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def check_finite(self, finite: Tensor) -> None:
        """Refuses a model whose logits are not finite.

        Args:
            finite: Whether they are.

        Raises:
            CheckpointError: They are NaN or infinite.
        """
        if not finite:
            raise CheckpointError(
                f"the model of {self.checkpoint.directory} gives logits that are NaN or infinite "
                "on this text",
                hint="its weights are damaged, or it overflows; run it with transformers to see",
            )

    def logits(self, y: Tensor) -> Tensor:
        """Logits [n, V] that norm and head make of hidden states [n, H] fp32, in its dtype."""
        shape, eps = (y.shape[-1],), self.spec.norm_epsilon
        if self.spec.norm == "layer":
            normed = functional.layer_norm(y, shape, self._norm_weight, self._norm_bias, eps)
        else:
            normed = functional.rms_norm(y, shape, self._norm_weight, eps)
        logits: Tensor = self.head(normed.to(self.dtype))
        return self._softcapped(logits)


class _Scaled:
    """The head of the model, whose weight a bundle has times a factor."""

    def __init__(self, module: Any, scale: float) -> None:
        self._module, self._scale = module, scale

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._module.weight * self._scale
        return weight

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._module(x) * self._scale
        return y


def _scaled(module: Any, scale: float) -> Any:
    return module if scale == 1 else _Scaled(module, scale)


class _Seen:
    """What goes into the last block, and out of it, as the model runs.

    Attributes:
        beside: Beside hidden states.
        output: [B, T, H].
    """

    def __init__(self) -> None:
        self.beside: Beside = (), {}
        self.output: Tensor

    @contextmanager
    def watch(self, layer: torch.nn.Module) -> Iterator[None]:
        """Looks on while the model runs."""
        handle = layer.register_forward_hook(self._look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.beside, self.output = (args[1:], kwargs), output_of(out)


def output_of(out: Any) -> Tensor:
    """Hidden states of what a block of transformers returns: them, or a tuple that they begin."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    try:
        with quiet_transformers():
            model = load_whole(checkpoint, dtype)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"transformers can't load {checkpoint.directory}: {str(error).splitlines()[0]}",
            hint="check the checkpoint with 'ojfa-export verify', or install a newer transformers",
        ) from error
    return model.requires_grad_(False)
