"""What quantising changed, as reports and commands say it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Change(BaseModel):
    """What quantising changed, on text: each token seen with those before it in its window.

    Attributes:
        tokens: That were compared.
        agreement: Share of tokens after which both models find the same next one likeliest.
        mean_kl: Kullback-Leibler divergence from the original, nats, on average.
        perplexity: Of the text, by the bundle.
        original_perplexity: Of the text, by the original.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(ge=1)
    agreement: float = Field(ge=0, le=1)
    mean_kl: float
    perplexity: float
    original_perplexity: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f}, the original's {self.original_perplexity:.3f}; "
            f"the same likeliest token for {self.agreement:.1%} of {self.tokens:,} tokens, "
            f"divergence {self.mean_kl:.4f} nats"
        )
