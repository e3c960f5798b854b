"""Backends by name. Each is a package that is imported only when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ojfa_export.errors import BackendError, UsageError

if TYPE_CHECKING:
    from ojfa_export.backends.backend import Backend

PACKAGES = {
    "onnxruntime": "ojfa_export.backends.onnxruntime.backend",
    "onnxruntime-cuda": "ojfa_export.backends.onnxruntime_cuda.backend",
    "tensorrt": "ojfa_export.backends.tensorrt.backend",
}
DEFAULT = "onnxruntime"


def load(name: str) -> Backend:
    """Imports a backend.

    Raises:
        UsageError: No such backend.
        BackendError: Its SDK is not installed.
    """
    if name not in PACKAGES:
        raise UsageError(
            f"backend '{name}' is not known", hint=f"known: {', '.join(sorted(PACKAGES))}"
        )
    try:
        backend: Backend = import_module(PACKAGES[name]).BACKEND
    except (ImportError, OSError) as error:  # OSError: of a library that an SDK loads by itself
        raise BackendError(
            f"backend '{name}' can't be used: {error}", hint="see 'ojfa-export doctor'"
        ) from error
    return backend
