"""Quantised weights, of the backends that run them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Backend
from ojfa_export.bundle.weight_format import QuantisedMatrix, WeightFormat
from ojfa_export.errors import BackendError


@runtime_checkable
class RunsQuantised(Protocol):
    """A backend that runs quantised weights."""

    def quantise(self, columns: NDArray[np.float32], form: WeightFormat) -> QuantisedMatrix:
        """Quantises a matrix x @ W.

        Args:
            columns: [inputs, outputs] float32, finite, in C order; inputs are whole groups.
            form: What to make.
        """
        ...


def check_runs(backend: Backend, form: WeightFormat | None) -> None:
    """Refuses quantised weights for a backend that doesn't run them.

    Args:
        backend: The backend.
        form: What weights are stored as; None where they are as precision says.

    Raises:
        BackendError: Naming the format.
    """
    if form is not None and not isinstance(backend, RunsQuantised):
        raise BackendError(
            f"the weights are {form}, which the {backend.name} backend doesn't run",
            hint="use the backend 'onnxruntime', or build without --weights, and from a checkpoint "
            "that isn't quantised",
        )
