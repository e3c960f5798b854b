"""Check heads, of the backends and engines that run them: docs/policies.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ojfa_export.backends.backend import Backend
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.errors import BackendError


@runtime_checkable
class RunsChecks(Protocol):
    """A backend that runs check heads.

    `Backend.build_engine` takes `names.CHECK_HEAD` as well, with the model of its tokens, and
    `open_engines` its engine, where there is one.

    Attributes:
        runs_checks: True.
    """

    runs_checks: bool


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


def checking(engines: object) -> ChecksExits | None:
    """The engines, where a check head, and not the exit head, says how sure exits are."""
    return engines if isinstance(engines, ChecksExits) and engines.has_check_head else None


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
            hint="use the backend 'onnxruntime', or build the bundle with --check-vocabulary 0",
        )
