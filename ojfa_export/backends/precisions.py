"""Precisions, of the backends that don't run all of them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ojfa_export.backends.backend import Backend
from ojfa_export.errors import BackendError
from ojfa_export.models.precision import Precision


@runtime_checkable
class RunsSomePrecisions(Protocol):
    """A backend that doesn't run every precision.

    Attributes:
        precisions: Those that it runs.
    """

    precisions: tuple[Precision, ...]


def check_precision(backend: Backend, precision: Precision) -> None:
    """Refuses a model in a precision that a backend doesn't run.

    Args:
        backend: The backend.
        precision: Of the model.

    Raises:
        BackendError: Naming both.
    """
    if isinstance(backend, RunsSomePrecisions) and precision not in backend.precisions:
        raise BackendError(
            f"the model is in {precision}, which the {backend.name} backend doesn't run",
            hint=f"build it with --precision {' or '.join(backend.precisions)}",
        )


def wider_than_fp16(backend: Backend) -> str:
    """The precisions with fp32's range that a backend runs, as options: for hints."""
    wider: tuple[Precision, ...] = ("bf16", "fp32")
    if isinstance(backend, RunsSomePrecisions):
        wider = tuple(each for each in wider if each in backend.precisions)
    return f"--precision {' or '.join(wider)}"
