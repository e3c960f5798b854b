"""The machine's memory, as Linux has it."""

from __future__ import annotations

from pathlib import Path


def read_meminfo() -> dict[str, int]:
    """Bytes by name ("MemTotal", "MemAvailable", ...); none where there is no such file."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {
        name: 1024 * int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if value.strip().endswith("kB")
    }
