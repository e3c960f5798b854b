"""What transformers says of a token sequence, in the two ways that it can be asked."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def full_forward(model: PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    """Logits [tokens, V] of one forward pass without a cache."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()


def longrope_decode(model: PreTrainedModel, token_ids: list[int], switch: int) -> np.ndarray:
    """Logits [tokens, V] where the last of each prefix is that of a forward of this prefix.

    Up to the switch length all positions are rotated by the short factors, beyond it by the long
    ones; attention is causal, so that one forward of each kind holds every prefix of its kind.
    """
    short, long = full_forward(model, token_ids[:switch]), full_forward(model, token_ids)
    return np.concatenate([short, long[switch:]])
