"""Check heads, of the backends and engines that run them: docs/policies.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ojfa_export.backends.backend import Backend
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.decoding.head_output import HeadOutput
from ojfa_export.errors import BackendError


@runtime_checkable
class RunsChecks(Protocol):
    """A backend that runs check heads.

    `Backend.build_engine` takes `names.CHECK_HEAD` as well, with the model of its tokens, and
    `open_engines` its engine, where there is one.

    Attributes:
        checks_by_default: Whether a build has a check head where that is worth it and nobody says
            otherwise.
    """

    checks_by_default: bool


@runtime_checkable
class ChecksExits(Protocol):
    """Engines that may have a check head.

    Attributes:
        has_check_head: Whether they do.
    """

    has_check_head: bool

    def check_logits(self, hidden: Hidden, blocks_run: int | Sequence[int]) -> Float32:
        """Applies the check head.

        Args:
            hidden: [rows, H].
            blocks_run: Of all rows, or of each; fewer than the model has.

        Returns:
            NumPy's [rows, n], of the head's tokens.
        """
        ...

    def check(self, hidden: Hidden, blocks_run: int | Sequence[int]) -> HeadOutput:
        """Applies the check head as `check_logits` does; only the confidence counts."""
        ...


def checking(engines: object) -> ChecksExits | None:
    """The engines, where a check head, and not the exit head, says how sure exits are."""
    return engines if isinstance(engines, ChecksExits) and engines.has_check_head else None


def same_for_all(blocks_run: int | Sequence[int]) -> int:
    """How many blocks all rows have run, of engines that don't ask exits together."""
    if isinstance(blocks_run, int):
        return blocks_run
    [one] = set(blocks_run)
    return one


def check_runs_checks(backend: Backend, tokens: int | None) -> None:
    """Refuses a check head for a backend that doesn't run it.

    Its thresholds are none of the whole head's: what was promised of them would not hold.

    Args:
        backend: The backend.
        tokens: Of the check head; None where there is none.

    Raises:
        BackendError: Naming the head.
    """
    if tokens and not isinstance(backend, RunsChecks):
        raise BackendError(
            f"exits are checked by a head of {tokens:,} tokens, which the {backend.name} backend "
            "doesn't run",
            hint="build the bundle with --check-vocabulary 0",
        )
