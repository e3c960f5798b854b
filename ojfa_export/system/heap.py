"""The process's heap: memory that was freed, and is still held."""

from __future__ import annotations

import ctypes
import gc


def trim_heap() -> None:
    """Gives freed memory back to the system, where the C library can (glibc).

    It keeps freed pieces below 32 MB for reuse, and those of one block's weights seldom fit the
    next one's: opening and closing GPT2-XL's blocks in turn left 1.1 GB that nothing used.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_memory() -> None:
    """Frees what refers to itself, as engines and sessions do, and gives it back to the system."""
    gc.collect()
    trim_heap()
