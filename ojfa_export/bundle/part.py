"""What all parts of the manifest have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Integers as C++ holds them, too.
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Part(BaseModel):
    """A part: it has no other fields than these, and none changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
