"""What users name may be a pipe; what lies in a checkpoint may not, nor a device or a socket."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ojfa_export.bundle.shortcut_file import load
from ojfa_export.compiler.settings import read_recipe
from ojfa_export.errors import CalibrationError, OjfaError
from ojfa_export.models.calibration_text import read_text
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.hub import resolve
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.promises.drift.log import read_logs
from ojfa_export.system.pipes import read_named


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
}


@pytest.fixture(params=SPECIAL)
def make_special(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return SPECIAL[request.param]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder from which paths are short enough for sockets."""
    monkeypatch.chdir(tmp_path)
    return Path()


CHECKPOINT_FILES = [
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json", "vocab.json", "any",
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_special_file_in_a_checkpoint(
    tiny_checkpoint: Path, short: Path, name: str, make_special: Callable[[Path], None]
) -> None:
    directory = shutil.copytree(tiny_checkpoint, short / "c")
    if name.startswith("pytorch") or name.endswith("index.json"):
        (directory / "model.safetensors").unlink()
    (directory / name).unlink(missing_ok=True)
    make_special(directory / name)
    with pytest.raises(OjfaError, match=f"c/{name} is no plain file"):
        resolve(str(directory))
    if name == "any" or name == "vocab.json":
        return
    # Whoever opens it without that is not kept waiting either.
    with pytest.raises(OjfaError, match=name):
        read_tokenizer(directory) if name == "tokenizer.json" else Checkpoint(directory)


READERS: dict[str, Callable[[Path], object]] = {
    "recipe.toml": lambda path: read_recipe(str(path)),
    "shortcut": load,
}


@pytest.mark.parametrize("name", READERS)
def test_special_file_where_only_a_file_will_do(
    short: Path, name: str, make_special: Callable[[Path], None]
) -> None:
    make_special(short / name)
    with pytest.raises(OjfaError, match=name):
        READERS[name](short / name)


@pytest.mark.parametrize("make", ["device", "socket"])
@pytest.mark.parametrize("read", [read_text, lambda path: read_logs([path], ())])
def test_named_file_that_is_neither_file_nor_pipe(short: Path, make: str, read) -> None:
    SPECIAL[make](short / "text")
    with pytest.raises(OjfaError, match=r"text can't be read: (text is no plain file|No such dev)"):
        read(short / "text")


def _write(path: Path | str, pieces: list[bytes], pause: float = 0.0) -> threading.Thread:
    def write() -> None:
        with open(path, "wb", buffering=0) as pipe:  # noqa: PTH123
            for piece in pieces:
                pipe.write(piece)
                time.sleep(pause)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_pipe_is_read_to_its_end(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pieces = [rng.bytes(int(size)) for size in rng.integers(1, 300_000, 5)]
    writer = _write(path, pieces, pause=0.01)
    assert read_named(path) == b"".join(pieces)
    writer.join()


def test_process_substitution_that_is_over(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"print('x')\n")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")).documents == ("print('x')\n",)
    os.close(reader)


def test_pipe_that_gives_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match=r"is a pipe that gave nothing for 0\.2 s"):
        read_named(Path(f"/dev/fd/{reader}"), patience=0.2)
    os.close(writer)
    os.close(reader)


def test_pipe_that_nobody_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ojfa_export.system.pipes.CONNECTION", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="pipe is empty"):
        read_text(tmp_path / "pipe")


def test_pipe_without_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = _write(path, [b"x" * 4096] * 3)
    with pytest.raises(OSError, match="more than 8192 bytes"):
        read_named(path, limit=8192)
    writer.join()
