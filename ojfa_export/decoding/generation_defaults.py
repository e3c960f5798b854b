"""How the makers of a model say that its text is generated: what a bundle has of that."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class GenerationDefaults(BaseModel):
    """Values for options that a request doesn't name; None and () where nothing is said.

    Attributes:
        temperature: Of sampling. Whether to sample is the request's to say.
        top_k: Sample among this many most likely tokens.
        top_p: Sample among the fewest tokens with this much probability.
        min_p: Leave out tokens with less than this share of the likeliest one's probability.
        repetition_penalty: As of `GenerationOptions`, for greedy text as well.
        suppress_tokens: Tokens that are never chosen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, gt=0, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1e-6, le=1e6)
    suppress_tokens: tuple[TokenId, ...] = ()

    @property
    def always(self) -> str:
        """In words, what holds for greedy text, too; empty for nothing."""
        parts = []
        if self.repetition_penalty is not None:
            parts.append(f"repetition penalty {self.repetition_penalty:g}")
        if self.suppress_tokens:
            parts.append(f"{len(self.suppress_tokens)} tokens never chosen")
        return ", ".join(parts)

    @property
    def sampling(self) -> str:
        """In words, what holds where tokens are sampled; empty for nothing."""
        named = {
            "temperature": self.temperature,
            "top-k": self.top_k,
            "top-p": self.top_p,
            "min-p": self.min_p,
        }
        return ", ".join(f"{name} {value:g}" for name, value in named.items() if value is not None)


NO_DEFAULTS = GenerationDefaults()
