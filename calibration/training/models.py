"""The models that are trained here: one small causal language model of each supported family.

All have 12 blocks, and dropout on what attention and MLP add to the residual stream.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from calibration.training.tokens import END_OF_TEXT_ID

BLOCKS = 12
MAX_POSITIONS = 1024


def build_llama(vocabulary_size: int, dropout: float) -> PreTrainedModel:
    """A Llama of 5.5 M parameters at a vocabulary of 4096."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=BLOCKS,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    _scale_residual_projections(model)
    _drop_residual_projections(model, dropout)
    return model


def build_gpt2(vocabulary_size: int, dropout: float) -> PreTrainedModel:
    """A GPT-2 of 8.2 M parameters at a vocabulary of 4096: tied head, learned positions.

    The MLP is a little narrower than four times the hidden size, which keeps the fp16 weights
    below 16 MiB.
    """
    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_positions=MAX_POSITIONS,
        n_embd=224,
        n_layer=BLOCKS,
        n_head=7,
        n_inner=864,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    return GPT2LMHeadModel(config)


def build_phi3(vocabulary_size: int, dropout: float) -> PreTrainedModel:
    """A Phi-3 of 8.2 M parameters at a vocabulary of 4096: a head of its own, 2 key-value heads."""
    config = Phi3Config(
        vocab_size=vocabulary_size,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        original_max_position_embeddings=MAX_POSITIONS,
        sliding_window=None,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )
    model = Phi3ForCausalLM(config)
    _scale_residual_projections(model)
    return model


def _residual_projections(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """The matrices whose outputs a Llama-like model adds to the residual stream."""
    return [
        projection
        for block in model.model.layers
        for projection in (block.self_attn.o_proj, block.mlp.down_proj)
    ]


def _scale_residual_projections(model: PreTrainedModel) -> None:
    """GPT-2's initialisation: keeps the residual stream's variance independent of depth."""
    for projection in _residual_projections(model):
        projection.weight.data.div_(math.sqrt(2 * BLOCKS))


def _drop_residual_projections(model: PreTrainedModel, dropout: float) -> None:
    """Dropout for a family whose configuration has none of its own."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, dropout, module.training)

    if dropout > 0:
        for projection in _residual_projections(model):
            projection.register_forward_hook(drop)
