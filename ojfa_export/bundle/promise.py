"""What is promised, and the evidence for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import UsageError

Share = Annotated[float, Field(ge=0, le=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
MadeOn = Literal["files", "self-text"]

DEFAULT_CONFIDENCE = 0.95
# Extra surprisal is bounded for a distribution-free statement: a token that the full model holds
# e^10 times less likely than its first choice counts as this, and so does any worse one.
SURPRISAL_CLIP = 10.0


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Part):
    """What a policy must keep, in every domain.

    Attributes:
        max_disagreement: Share of tokens that may differ from the full model's choice.
        confidence: Of the whole statement, over the draw of the calibration text.
        max_extra_surprisal: In nats, the mean over tokens, each clipped to `surprisal_clip`; None
            for no such limit.
        surprisal_clip: In nats.
    """

    max_disagreement: Inside
    confidence: Inside = DEFAULT_CONFIDENCE
    max_extra_surprisal: PositiveFloat | None = None
    surprisal_clip: PositiveFloat = SURPRISAL_CLIP

    def shares(self) -> list[float]:
        """The limits of the risks in `Outcome`, as shares of what is possible."""
        limits = [self.max_disagreement]
        if self.max_extra_surprisal is not None:
            limits.append(self.max_extra_surprisal / self.surprisal_clip)
        return limits


def check_limits(
    max_disagreement: float, confidence: float, max_extra_surprisal: float | None = None
) -> Limits:
    """Limits of what a user asked.

    Raises:
        UsageError: One is out of range.
    """
    for name, value in (("max-disagreement", max_disagreement), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UsageError(
                f"{name} must be between 0 and 1, not {value:g}",
                hint="5% is 0.05, and 95% is 0.95; nothing can be promised of 0 or 1",
            )
    if max_extra_surprisal is not None and not 0 < max_extra_surprisal < SURPRISAL_CLIP:
        raise UsageError(
            f"max-extra-surprisal must be between 0 and {SURPRISAL_CLIP:g} nats, not "
            f"{max_extra_surprisal:g}",
            hint=f"the extra surprisal of a token is counted up to {SURPRISAL_CLIP:g} nats",
        )
    return Limits(
        max_disagreement=max_disagreement,
        confidence=confidence,
        max_extra_surprisal=max_extra_surprisal,
    )


class DomainEvidence(_Part):
    """The certification split of one domain under the policy.

    Where the tuning split shows no exits to be worth it, nothing is certified, and that is it.

    Attributes:
        name: Of the domain.
        windows: Independent pieces of text behind the p-value.
        tokens: Tokens measured in them.
        disagreement: The share that differs.
        extra_surprisal: Its mean in nats, clipped.
        depth: Blocks run for a token, on average.
        p_value: Of "a limit is broken here"; None at full depth, where no test is needed.
        made_on: Windows of files, or what the model wrote itself.
        text: What the text is, for people.
    """

    name: str
    windows: PositiveInt
    tokens: PositiveInt
    disagreement: Share
    extra_surprisal: NonNegativeFloat
    depth: PositiveFloat
    p_value: Share | None
    made_on: MadeOn = "files"
    text: str = ""


class Promise(_Part):
    """What `docs/guarantees.md` explains.

    Attributes:
        limits: What was asked.
        policy: Exits and thresholds that keep it; None is full depth, which always does.
        domains: The evidence, in every domain.
        relative_cost: Expected cost of a token, full depth being 1.
        candidates: Policies that were shown to keep the limits; `policy` is the last of them.
        reason: In words.
    """

    limits: Limits
    policy: ExitPolicy | None
    domains: tuple[DomainEvidence, ...] = Field(min_length=1)
    relative_cost: PositiveFloat
    candidates: int = Field(ge=0)
    reason: str
