"""One comparison of a bundle with its reference, as reports list it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Check(BaseModel):
    """One comparison of the bundle with its reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    max_abs_diff: float
    tolerance: float
    passed: bool
