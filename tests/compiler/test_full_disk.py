"""A disk that is full, in each place that writes: no bundle, and the build goes on with room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from steps import contents

from ojfa_export.compiler import stages
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.parts import calibrate_only, export_only
from ojfa_export.compiler.pipeline import build
from ojfa_export.errors import CalibrationError
from ojfa_export.graphs import weights
from ojfa_export.system import atomic
from ojfa_export.system.progress import SILENT

Options = Callable[..., Any]


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# The places of a build, in order, that write: the function that does, and its owner.
WRITERS = [
    (weights.WeightFile, "_write"),
    (stages, "build_engines"),
    (atomic.os, "fsync"),
    (Path, "write_text"),
]


@pytest.mark.parametrize(("owner", "name"), WRITERS)
def test_write_that_fails(
    owner: Any,
    name: str,
    options: Options,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_space)
        with pytest.raises(OSError, match="No space left") as caught:
            build(options())
        assert caught.value.filename == str(tmp_path / "out.ojfa.partial")
        with pytest.raises(OSError, match="No space left"):
            build(options())  # trying again without room changes nothing
        if name != "write_text":  # these two write no text
            with pytest.raises(OSError, match="No space left"):
                calibrate_only(options(output=tmp_path / "jump"), SILENT)
    assert {path.name for path in tmp_path.iterdir()} <= {"out.ojfa.partial", "jump.partial"}
    assert contents(build(options()).bundle) == contents(tiny_bundle)


def test_export_that_fails_leaves_nothing(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.WeightFile, "_write", no_space)
    with pytest.raises(OSError, match="No space left"):
        export_only(options(), (), SILENT)
    assert list(tmp_path.iterdir()) == []


def test_engines_that_fail_leave_the_bundle(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "copy.ojfa"
    shutil.copytree(tiny_bundle, bundle)
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        add_engines(bundle, "onnxruntime", SILENT)
    assert contents(bundle) == contents(tiny_bundle)


def test_room_for_hidden_states_is_checked_first(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(CalibrationError, match=r"0\.0 GB free; calibration needs") as caught:
        build(options())
    assert "--calibration-tokens" in str(caught.value.hint)
    assert not options().output.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = False

    def mount(size: int) -> Path:
        nonlocal mounted
        arguments = ["-t", "tmpfs", "-o", f"{'remount,' if mounted else ''}size={size}k"]
        done = subprocess.run(
            ["mount", *arguments, "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"can't mount a small file system here: {done.stderr.strip()}")
        mounted = True
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_real_full_disk(
    small_disk: Callable[[int], Path], options: Options, tiny_bundle: Path
) -> None:
    for size in (100, 700):  # KiB: full while exporting, and later
        asked = options(output=small_disk(size) / "out.ojfa")
        with pytest.raises((OSError, CalibrationError)) as caught:
            build(asked)
        assert isinstance(caught.value, CalibrationError) or caught.value.errno == errno.ENOSPC
        assert not asked.output.exists()
    small_disk(100_000)
    build(asked)
    assert contents(asked.output) == contents(tiny_bundle)
