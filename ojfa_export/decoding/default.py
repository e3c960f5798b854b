"""What a bundle does where its user names neither an exit nor speculation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat

from ojfa_export.decoding.speculation import Speculation


class Default(BaseModel):
    """The planned way of decoding one sequence greedily.

    It gives the tokens of full depth, or keeps the bundle's promise. Batches and sampling run at
    full depth: plan and promise are about one sequence and the likeliest tokens.

    Attributes:
        exit: "auto" only of a bundle with a promise.
        speculation: How to draft, with the exit "full"; None for not at all.
        ms_per_token: As planned for the machine that built the bundle.
        full_ms_per_token: Of full depth.
        reason: In words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exit: Literal["full", "auto"]
    speculation: Speculation | None
    ms_per_token: PositiveFloat
    full_ms_per_token: PositiveFloat
    reason: str
