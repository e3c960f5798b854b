"""Sizes of device memory."""

from __future__ import annotations

GIB = 1 << 30


def readable(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.2f} MiB"
