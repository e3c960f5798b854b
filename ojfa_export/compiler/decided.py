"""What a build decided on exits, for the manifest."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ojfa_export.bundle.promise import Promise
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.policy import ExitPolicy

# What `--exit auto` means where no early exit keeps the promise.
FULL_DEPTH = ExitPolicy(exits=(), measure="top", thresholds=())


class Decided(BaseModel):
    """What the bundle's manifest says of its exits.

    Attributes:
        promise: What was asked and shown of `--exit auto`, if anything.
        default: What happens where a user names no way; None without statistics.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    promise: Promise | None = None
    default: Default | None = None

    @property
    def auto(self) -> ExitPolicy | None:
        """What `--exit auto` means."""
        return None if self.promise is None else self.promise.policy or FULL_DEPTH


def load_decided(work: Work) -> Decided:
    """What `decide` kept; nothing, where there was no text for it."""
    path = work.scratch / "exits.json"
    if not path.exists():
        return Decided()
    return Decided.model_validate_json(path.read_text(encoding="utf-8"))
