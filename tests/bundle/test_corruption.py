"""Hundreds of random corruptions: none is loaded, and each ends in an error that users can read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_copy import BundleCopy
from hostile import Rng, change_a_value, pick

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import MANIFEST
from ojfa_export.errors import BundleError

CASES = 400


def _files(copy: BundleCopy) -> list[str]:
    paths = (path for path in copy.directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(copy.directory).as_posix() for path in paths)


def _flip_byte(copy: BundleCopy, rng: Rng) -> str:
    name = pick(rng, _files(copy))
    data = bytearray(copy.own(name).read_bytes())
    at, bits = int(rng.integers(len(data))), int(rng.integers(1, 256))
    data[at] ^= bits
    (copy.directory / name).write_bytes(data)
    return f"{name}: byte {at} ^ {bits:#x}"


def _truncate(copy: BundleCopy, rng: Rng) -> str:
    name = pick(rng, _files(copy))
    data = copy.own(name).read_bytes()
    # One byte less of the manifest is one line break less.
    size = int(rng.integers(len(data) - (name == MANIFEST)))
    (copy.directory / name).write_bytes(data[:size])
    return f"{name}: cut to {size} bytes"


def _append(copy: BundleCopy, rng: Rng) -> str:
    name = pick(rng, _files(copy))
    path = copy.own(name)
    path.write_bytes(path.read_bytes() + b"x" + rng.bytes(int(rng.integers(64))))
    return f"{name}: bytes appended"


def _delete(copy: BundleCopy, rng: Rng) -> str:
    name = pick(rng, _files(copy))
    (copy.directory / name).unlink()
    return f"{name}: deleted"


def _swap(copy: BundleCopy, rng: Rng) -> str:
    while True:
        one, other = (copy.directory / pick(rng, _files(copy)) for _ in range(2))
        if one.read_bytes() != other.read_bytes():
            break
    aside = copy.directory.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one} and {other}: swapped"


def _rename(copy: BundleCopy, rng: Rng) -> str:
    name = pick(rng, _files(copy))
    path = copy.directory / name
    path.rename(path.with_name(pick(rng, [f"{path.name}.old", f".{path.name}", "x", "é"])))
    return f"{name}: renamed"


def _add(copy: BundleCopy, rng: Rng) -> str:
    directories = [copy.directory, *(p for p in copy.directory.rglob("*") if p.is_dir())]
    path = pick(rng, sorted(directories)) / pick(rng, [".hidden", "extra.bin", "a\nb", MANIFEST])
    if path.exists():
        path = path.with_name("other")
    path.write_bytes(rng.bytes(8))
    return f"{path}: added"


def _edit_manifest(copy: BundleCopy, rng: Rng) -> str:
    """Changes a random value, removes or adds a field, or doubles a list's entry."""
    done = ""

    def change(fields: dict[str, Any]) -> None:
        nonlocal done
        done = change_a_value(fields, rng)

    copy.edit_manifest(change, resign=False)
    return done


CORRUPTIONS: list[Callable[[BundleCopy, Rng], str]] = [
    _flip_byte,
    _truncate,
    _append,
    _delete,
    _swap,
    _rename,
    _add,
    _edit_manifest,
    _edit_manifest,
]


def _same_manifest(copy: BundleCopy, original: Path) -> bool:
    """Whether the manifest still says the same, as after a change of white space."""
    try:
        now = json.loads((copy.directory / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return bool(now == json.loads((original / MANIFEST).read_bytes()))


def test_no_random_corruption_is_loaded(
    tiny_bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    original = sorted((p, p.read_bytes()) for p in tiny_bundle.rglob("*") if p.is_file())
    corrupted = 0
    while corrupted < CASES:
        copy = BundleCopy(tiny_bundle, tmp_path / "copy")
        files = _files(copy)
        what = CORRUPTIONS[corrupted % len(CORRUPTIONS)](copy, rng)
        untouched = files == _files(copy) and all(
            (copy.directory / name).read_bytes() == (tiny_bundle / name).read_bytes()
            for name in files
            if name != MANIFEST
        )
        if not (untouched and _same_manifest(copy, tiny_bundle)):
            corrupted += 1
            _assert_refused(copy.directory, what)
        shutil.rmtree(copy.directory)
    Bundle(tiny_bundle)  # it was never the original that was refused
    assert original == sorted((p, p.read_bytes()) for p in tiny_bundle.rglob("*") if p.is_file())


def _assert_refused(directory: Path, what: str) -> None:
    print(what)  # shown where the test fails
    with pytest.raises(BundleError) as caught:
        Bundle(directory)
    assert str(directory) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["embed.bin", "embed.onnx", "block_01.bin", "exit_head.bin"])
def test_flipped_byte_of_a_graph_is_named(
    copy: BundleCopy, kind: str, rng: np.random.Generator
) -> None:
    path = copy.own(f"graphs/{kind}")
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{kind} was altered"):
        Bundle(copy.directory)


def test_white_space_in_the_manifest_is_no_corruption(copy: BundleCopy, tiny_bundle: Path) -> None:
    path = copy.own(MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert Bundle(copy.directory).manifest == Bundle(tiny_bundle).manifest
