"""What a build decided on exits, for the manifest."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ojfa_export.backends.frugal import LARGE_BYTES, weight_bytes
from ojfa_export.bundle.promise import Promise
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.spec import ModelSpec

# What `--exit auto` means where no early exit keeps the promise.
FULL_DEPTH = ExitPolicy(exits=(), measure="top", thresholds=())
# Of a model that is timed whole, in fp32. One of these loads in seconds, and building it has taken
# about as much memory already.
WHOLE_BYTES = LARGE_BYTES


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


def is_timed_whole(spec: ModelSpec) -> bool:
    """Whether a build times a model's steps, whatever is asked of it."""
    return weight_bytes(spec) <= WHOLE_BYTES


def why_not_planned(spec: ModelSpec, has_statistics: bool) -> str:
    """Why a build planned no default, in words.

    Args:
        spec: The model.
        has_statistics: Whether there was text to look at exits on.
    """
    if not has_statistics:
        return (
            "full depth: not planned, as fitting left no text to look at exits on; build with more "
            "--calibration-data"
        )
    size = weight_bytes(spec) / 1e9
    if is_timed_whole(spec):
        return (
            f"full depth: not planned, though the model takes {size:.1f} GB in fp32, which is "
            "timed by now; build again, or ask 'ojfa-export plan'"
        )
    return (
        f"full depth: not planned, as the model takes {size:.1f} GB in fp32, and builds time those "
        f"up to {WHOLE_BYTES / 1e9:.0f} GB; 'ojfa-export plan' times this one"
    )
