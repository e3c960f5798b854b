"""How fast the C++ runtime loads a bundle, against reading the same files."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.cpp.turns import InCpp

PIECE = 16 << 20
READERS = 16


def loading(program: Path, bundle: Path, turns: int = 2) -> dict[str, Any]:
    """Seconds of reading all files and of loading the model, each from the disk and from memory.

    Args:
        program: ojfa-turns.
        bundle: What is loaded, with golden tokens, to the last block's weights on the device.
        turns: Of each.
    """
    paths = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in paths)
    result: dict[str, Any] = {"bytes": size, "from_disk": [], "from_memory": []}
    for where in ("from_memory", "from_disk"):
        for _ in range(turns):
            cold = where == "from_disk"
            cached = [_leave(paths)] if cold else []
            read = _read(paths)
            if cold:
                cached.append(_leave(paths))
            with InCpp(program, bundle) as cpp:
                told = cpp.loading
            row = {"read_seconds": read, "left_in_memory": cached, **told}
            row["share_of_read_speed"] = read / (told["loaded_ms"] / 1e3)
            result[where].append(row)
            print(
                f"{where}: read at {size / read / 1e9:.2f} GB/s, "
                f"loaded at {size / told['loaded_ms'] / 1e6:.2f} GB/s",
                flush=True,
            )
    return result


def _read(paths: list[Path]) -> float:
    """Seconds of reading files, several pieces at a time."""
    pieces = [(path, start) for path in paths for start in range(0, path.stat().st_size, PIECE)]

    def read(piece: tuple[Path, int]) -> None:
        path, start = piece
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            file.readinto(bytearray(PIECE))

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as threads:
        list(threads.map(read, pieces))
    return time.perf_counter() - start


def _leave(paths: list[Path]) -> str:
    """Drops files from the page cache, as far as the system lets us; how."""
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")
    except OSError:
        return "posix_fadvise"
    return "drop_caches"
