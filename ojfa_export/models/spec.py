"""What a model is, in the few numbers that every later stage reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rms", "layer"]
NormPlace = Literal["before", "after", "both"]
QkNorm = Literal["none", "head", "projection"]
Softcap = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Fields that came after the first bundles.
LATER = (
    *("norms", "parallel", "qk_norm", "rotated", "windowed"),
    *("rotated_second", "attention_softcap", "logit_softcap"),
)
# Names of rotations, of the first set of rotary factors and of the second.
FIRST, SECOND = ("cos", "sin"), ("cos_second", "sin_second")


class ModelSpec(BaseModel):
    """The architecture of one decoder-only model.

    All families are the same block (norm, attention, residual, norm, MLP, residual) with different
    parts; this names the parts.

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
        norms: Whether attention and MLP have their norm before them, or after them, of what they
            give before it is added, or one in both places.
        parallel: Whether the MLP sees what attention sees, the block's input, rather than what
            attention has been added to.
        qk_norm: RMSNorm of queries and of keys before they rotate, if any: of each head's
            features, or of all heads' together.
        rotated: For each block whether it rotates; empty where all do as `rotary_dim` says.
        windowed: For each block whether it has the window; empty where all have.
        rotated_second: For each block whether it rotates by the second of two sets of rotary
            factors; empty where there is one set, or where `rotary_switch` says which.
        attention_softcap: What keeps scores of attention within it, s = tanh(s / cap) * cap, before
            keys are masked; None for scores as they are.
        logit_softcap: The same of logits, the exits' too.
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
    norms: NormPlace = "before"
    parallel: bool = False
    qk_norm: QkNorm = "none"
    rotated: tuple[bool, ...] = ()
    windowed: tuple[bool, ...] = ()
    rotated_second: tuple[bool, ...] = ()
    attention_softcap: Softcap | None = None
    logit_softcap: Softcap | None = None

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later are left out where they say nothing.

        Bundles of other models stay as they were, and what reads those knows no such fields.
        """
        fields: dict[str, Any] = handler(self)
        for name in LATER:
            if getattr(self, name) == type(self).model_fields[name].default:
                del fields[name]
        return fields

    @property
    def learned_positions(self) -> bool:
        """Whether positions are an embedding rather than a rotation."""
        return self.rotary_dim == 0

    def with_vocabulary(self, size: int) -> ModelSpec:
        """The model as a head sees it whose logits are of so many of its tokens."""
        return self.model_copy(update={"vocab_size": size})

    def rotary_dim_of(self, block: int) -> int:
        """Leading features of each head that rotate in a block."""
        return self.rotary_dim if not self.rotated or self.rotated[block] else 0

    def norms_are(self, place: Literal["before", "after"]) -> bool:
        """Whether attention and MLP have a norm there."""
        return self.norms in (place, "both")

    def norm_name(self, place: Literal["before", "after"]) -> str:
        """What the norm there is called after "attention." or "mlp."."""
        return "after_norm" if (self.norms, place) == ("both", "after") else "norm"

    @property
    def rotary_sets(self) -> int:
        """Sets of rotary factors: the tables' second set of rows follows the first."""
        return 2 if self.rotated_second or self.rotary_switch is not None else 1

    @property
    def rotations(self) -> tuple[str, ...]:
        """Which rotations the graphs of blocks take, by name; nothing with learned positions."""
        if self.learned_positions:
            return ()
        return (*FIRST, *SECOND) if self.rotated_second else FIRST

    def rotations_of(self, block: int) -> tuple[str, str]:
        """Those that a block which rotates uses: its cosines and its sines."""
        return SECOND if self.rotated_second and self.rotated_second[block] else FIRST

    def window_of(self, block: int) -> int | None:
        """Keys that a query sees at most in a block, itself included; None for all."""
        return self.window if not self.windowed or self.windowed[block] else None

    def like(self, block: int) -> int:
        """The first block that differs from this one in its weights alone."""
        parts = [
            (
                self.attention_scales[each],
                self.rotary_dim_of(each),
                self.rotations_of(each),
                self.window_of(each),
            )
            for each in range(block + 1)
        ]
        return parts.index(parts[block])

    @property
    def qk_norm_features(self) -> tuple[int, int]:
        """Features that the norms of queries and of keys take together; zeros where none are."""
        if self.qk_norm == "none":
            return 0, 0
        heads = (1, 1) if self.qk_norm == "head" else (self.heads, self.kv_heads)
        return heads[0] * self.head_dim, heads[1] * self.head_dim
