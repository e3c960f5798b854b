"""Exits that decide per token: where the exit head is asked, and how sure it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.exits import check_served
from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import listed, real_number, whole_number

_FINITE = "leave out an exit at which nothing shall stop"
_EXAMPLE = "as in ExitPolicy(exits=(4, 8), measure='top', thresholds=(0.9, 0.8))"


class ExitPolicy(BaseModel):
    """When a token may leave before the last block.

    After each of `exits` the exit head's confidence is compared with that exit's threshold: a
    token whose confidence reaches it stops there. One that is sure nowhere takes the full model.

    Attributes:
        exits: Blocks run before each check, increasing; none for full depth always.
        measure: What confidence is; see `confidence`.
        thresholds: The least confidence that stops, one for each exit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    exits: tuple[int, ...]
    measure: Measure
    thresholds: tuple[float, ...]

    @model_validator(mode="wrap")
    @classmethod
    def _read(
        cls, values: Any, handler: ModelWrapValidatorHandler[ExitPolicy], info: ValidationInfo
    ) -> ExitPolicy:
        """What a caller gives is read as everywhere; a bundle's JSON has its own error."""
        if info.mode == "json" or not isinstance(values, dict):
            return handler(values)
        read = dict(values)
        if "exits" in values:
            read["exits"] = listed("exits of an exit policy", values["exits"], _exit)
        if "thresholds" in values:
            read["thresholds"] = listed("thresholds of an exit policy", values["thresholds"], _real)
        try:
            return handler(read)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UsageError(f"{place} of an exit policy: {first['msg']}", hint=_EXAMPLE) from error

    @model_validator(mode="after")
    def _check(self) -> ExitPolicy:
        if len(self.thresholds) != len(self.exits):
            raise UsageError(
                f"an exit policy has {len(self.exits)} exits and {len(self.thresholds)} thresholds",
                hint="give one threshold for each exit",
            )
        if any(exit < 1 for exit in self.exits) or list(self.exits) != sorted(set(self.exits)):
            raise UsageError(
                f"the exits {list(self.exits)} of an exit policy are not increasing from 1 on"
            )
        if not all(map(math.isfinite, self.thresholds)):
            raise UsageError(
                f"the thresholds {list(self.thresholds)} of an exit policy are not all finite",
                hint=_FINITE,
            )
        return self

    def check_fits(self, blocks: int, served: Sequence[int] | None = None) -> None:
        """Checks that the exits lie before a model's last block, and that they are there.

        Args:
            blocks: Of the model.
            served: The exits that there are; None for all.

        Raises:
            UsageError: One isn't.
        """
        if self.exits and self.exits[-1] >= blocks:
            raise UsageError(
                f"exit {self.exits[-1]} of the exit policy is outside this model's 1..{blocks - 1}",
                hint="tokens that no exit stops run all blocks without being named",
            )
        check_served(self.exits, served)


def _exit(value: Any) -> int:
    return whole_number("an exit of an exit policy", value)


def _real(value: Any) -> float:
    if isinstance(value, float):
        return value  # one that isn't finite is named together with the others
    return real_number("a threshold of an exit policy", value, hint=_FINITE)
