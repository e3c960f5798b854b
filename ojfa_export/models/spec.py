"""What a model is, in the few numbers that every later stage reads."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rms", "layer"]
Precision = Literal["fp32", "fp16"]


class ModelSpec(BaseModel):
    """The architecture of one decoder-only model.

    All families are the same pre-norm block (norm, attention, residual, norm, MLP, residual)
    with different parts; this names the parts.

    Attributes:
        attention_scales: Factor on q.k for each block, length `blocks`.
        window: Keys a query sees at most, itself included; None for all.
        rotary_dim: Leading features of each head that rotate; 0 for learned positions.
        rotary_switch: Sequence length above which LongRoPE's long factors apply to every
            position; None for one set of factors.
        gated: Whether the MLP is act(gate) * up rather than act(up).
        max_positions: Positions that the model was made for; a hard limit where positions
            are learned.
        tied_head: Whether the LM head is the token embedding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    blocks: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    attention_scales: tuple[float, ...]
    window: PositiveInt | None
    rotary_dim: int
    rotary_switch: PositiveInt | None
    activation: Activation
    gated: bool
    norm: NormKind
    norm_epsilon: float = Field(ge=0, allow_inf_nan=False)
    max_positions: PositiveInt
    tied_head: bool
    eos_token_ids: tuple[int, ...]

    @property
    def learned_positions(self) -> bool:
        """Whether positions are an embedding rather than a rotation."""
        return self.rotary_dim == 0
