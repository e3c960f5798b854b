"""Plain files are read whole; anything else under a file's name is refused at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ojfa_export.system.files import check_regular, read_regular


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, _listen, os.mkdir, lambda path: path.symlink_to("/dev/zero")],
    ids=["pipe", "socket", "directory", "device"],
)
@pytest.mark.parametrize(
    "read", [check_regular, lambda path: read_regular(path, 100)], ids=["check", "read"]
)
def test_special_file_is_refused_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    read: Callable[[Path], object],
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("file"))
    with pytest.raises(OSError, match="file"):
        read(Path("file"))


def test_plain_file_up_to_its_limit(tmp_path: Path, rng: np.random.Generator) -> None:
    path, data = tmp_path / "file", rng.bytes(int(rng.integers(1, 3 << 20)))
    path.write_bytes(data)
    (tmp_path / "link").symlink_to(path)
    assert read_regular(path, len(data)) == read_regular(tmp_path / "link", 1 << 30) == data
    with pytest.raises(OSError, match=f"more than the {len(data) - 1}"):
        read_regular(path, len(data) - 1)


def test_file_that_says_no_size_is_still_bounded() -> None:
    with pytest.raises(OSError, match="more than the 10 bytes"):
        read_regular(Path("/proc/self/maps"), 10)
