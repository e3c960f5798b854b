"""Keys and values that are kept narrower than products are computed, by backends that do that."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from ojfa_export.backends.backend import Backend, Engines, PagedCache
from ojfa_export.errors import BackendError
from ojfa_export.models.precision import Precision

# OCP's e4m3, of numbers as they are: without scales, beyond 448 its largest number.
CacheStorage = Literal["fp8"]


@runtime_checkable
class NarrowsCache(Protocol):
    """A backend whose engines may keep keys and values narrower than the rest.

    Attributes:
        beside_fp8_cache: Precisions that the rest of such a model may have.
    """

    beside_fp8_cache: tuple[Precision, ...]

    def with_cache(self, storage: CacheStorage) -> Backend:
        """The backend whose engines do so; what was built opens with this one as well."""
        ...


def with_cache(backend: Backend, storage: CacheStorage | None, precision: Precision) -> Backend:
    """A backend that builds engines with a cache as asked for.

    Args:
        backend: The backend.
        storage: Of keys and values; None for what products are computed in.
        precision: Of the model.

    Raises:
        BackendError: It has no such engines.
    """
    if storage is None:
        return backend
    if not isinstance(backend, NarrowsCache):
        raise BackendError(
            f"the {backend.name} backend keeps no keys and values in {storage}",
            hint="build without --cache, or with --backend tensorrt",
        )
    if precision not in backend.beside_fp8_cache:
        raise BackendError(
            f"the {backend.name} backend keeps no keys and values in {storage} beside {precision}",
            hint=f"build with --precision {' or '.join(backend.beside_fp8_cache)}, or without "
            "--cache",
        )
    return backend.with_cache(storage)


def has_fp8_cache(engines: Engines) -> bool:
    """Whether opened engines keep keys and values in fp8."""
    return isinstance(engines, PagedCache) and engines.cache_element_bytes == 1
