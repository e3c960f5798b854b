"""Quantised weights, of the backends that run them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Backend
from ojfa_export.bundle.weight_format import Quantised, QuantisedMatrix, WeightFormat
from ojfa_export.errors import BackendError
from ojfa_export.models.precision import Precision


@runtime_checkable
class RunsQuantised(Protocol):
    """A backend that runs quantised weights.

    Attributes:
        beside_quantised: Precisions that the rest of such a model may have.
        group_sizes: That it runs; the first that divides a model's features is its default.
        runs_offsets: Whether zero points of four bits may have a fraction.
    """

    beside_quantised: tuple[Precision, ...]
    group_sizes: tuple[int, ...]
    runs_offsets: bool

    def lacks(self, storage: Quantised) -> str | None:
        """Why it doesn't run numbers of a kind, to be said after them; None where it does."""
        ...

    def quantise(self, columns: NDArray[np.float32], form: WeightFormat) -> QuantisedMatrix:
        """Quantises a matrix x @ W.

        Args:
            columns: [inputs, outputs] float32, finite, in C order; inputs are whole groups.
            form: What to make.
        """
        ...


def check_runs(backend: Backend, form: WeightFormat | None, precision: Precision) -> None:
    """Refuses quantised weights for a backend that doesn't run them.

    Args:
        backend: The backend.
        form: What weights are stored as; None where they are as precision says.
        precision: Of all else.

    Raises:
        BackendError: Naming the format.
    """
    if form is None:
        return
    if not isinstance(backend, RunsQuantised):
        raise BackendError(
            f"the weights are {form}, which the {backend.name} backend doesn't run",
            hint="use the backend 'onnxruntime' or 'tensorrt', or build from a checkpoint that "
            "isn't quantised, without --weights",
        )
    if why := backend.lacks(form.storage):  # type: ignore[arg-type]
        raise BackendError(
            f"the weights are {form}, {why}",
            hint="build with --weights int8; these are run by the backend 'tensorrt', beside "
            "--precision fp16 or bf16",
        )
    if precision not in backend.beside_quantised:
        raise BackendError(
            f"the weights are {form} beside {precision}, which the {backend.name} backend "
            "doesn't run",
            hint=f"build with --precision {' or '.join(backend.beside_quantised)}, or for another "
            "backend",
        )
    if form.offsets and not backend.runs_offsets:
        raise BackendError(
            f"the weights are {form}, which the {backend.name} backend doesn't run",
            hint="build from the checkpoint again, for this backend: its zero points are whole",
        )
    if form.group_size not in backend.group_sizes:
        sizes = ", ".join(map(str, sorted(backend.group_sizes)))
        raise BackendError(
            f"the weights are {form}, whose groups the {backend.name} backend doesn't run",
            hint=f"it runs groups of {sizes}; the backend 'onnxruntime' runs these",
        )
