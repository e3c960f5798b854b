"""A bundle that changes after it was opened: nothing of another bundle runs, without a word."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundle_copy import BundleCopy

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.errors import BundleError
from ojfa_export.runtime.model import Model, load

STORED = Path(__file__).parents[2] / "engines" / "tests" / "vectors" / "llama.ojfa"
WEIGHTS = "graphs/block_02.bin"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A bundle of its own, no file shared with another."""
    return Path(shutil.copytree(STORED, tmp_path / "model.ojfa"))


def generate(model: Model, exit: int) -> list[int]:
    session = model.session(1, 8)
    return [int(session.advance([token], exit)[0].argmax()) for token in (1, 2, 3)]


def overwrite(directory: Path) -> None:
    path = directory / WEIGHTS
    data = bytearray(path.read_bytes())
    data[200] ^= 0x40
    with path.open("r+b") as file:
        file.write(data)


def overwrite_and_hide(directory: Path) -> None:
    before = (directory / WEIGHTS).stat()
    overwrite(directory)
    os.utime(directory / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, 100)


def delete(directory: Path) -> None:
    shutil.rmtree(directory)


def exchange(directory: Path) -> None:
    """Puts another bundle in its place, of the same shapes."""
    other = Path(shutil.copytree(directory, directory.with_name("new")))
    overwrite(other)
    directory.rename(directory.with_name("old"))
    other.rename(directory)


def link_elsewhere(directory: Path) -> None:
    path = directory / WEIGHTS
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def make_a_pipe(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)


CHANGES = [
    overwrite,
    overwrite_and_hide,
    truncate,
    delete,
    exchange,
    link_elsewhere,
    make_a_pipe,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_block_of_a_changed_bundle_is_not_loaded(
    stored: Path, change: Callable[[Path], None]
) -> None:
    model = load(stored)
    expected = generate(model, 2)
    change(stored)
    with pytest.raises(BundleError, match=r"model\.ojfa was changed after it was opened") as caught:
        generate(model, 4)
    assert "exchanging whole directories" in str(caught.value.hint)
    if change in (delete, exchange):  # what was loaded is still what was checked
        assert generate(model, 2) == expected


def test_weights_that_are_written_into_while_they_are_mapped(stored: Path) -> None:
    model = load(stored)
    generate(model, 4)
    overwrite(stored)
    with pytest.raises(BundleError, match=r"was changed after it was opened: .*block_02\.bin"):
        model.session()


def test_engine_and_tensor_of_a_changed_file(stored: Path) -> None:
    bundle = Bundle(stored)
    tables = bundle.manifest.rotary
    assert tables is not None
    before = bundle.tensor(tables.cos)
    kept = before.copy()
    (stored / tables.cos.file).write_bytes(b"")
    np.testing.assert_array_equal(before, kept)  # it is no map of the file
    with pytest.raises(BundleError, match="was changed after it was opened"):
        bundle.tensor(tables.cos)


def test_touched_linked_or_copied_bundle_goes_on(stored: Path, tmp_path: Path) -> None:
    expected = generate(load(stored), 4)
    model = load(stored)
    shutil.copytree(stored, tmp_path / "backup", copy_function=os.link)
    for path in stored.rglob("*"):
        path.touch()
    assert generate(model, 2)
    again = Path(shutil.copytree(stored, tmp_path / "again"))
    shutil.rmtree(stored)
    again.rename(stored)
    assert generate(model, 4) == expected


def test_link_to_a_bundle_that_is_turned_to_another(stored: Path, tmp_path: Path) -> None:
    current = tmp_path / "current"
    current.symlink_to(stored)
    expected, model = generate(load(stored), 4), load(current)
    other = Path(shutil.copytree(stored, tmp_path / "other"))
    current.unlink()
    current.symlink_to(other)
    shutil.rmtree(other)
    assert generate(model, 4) == expected


def test_file_that_changes_while_the_runtime_opens_it(copy: BundleCopy) -> None:
    bundle = Bundle(copy.directory)
    path = bundle.files.directory / "tokenizer.json"
    with pytest.raises(BundleError, match="was changed after"), bundle.files.held(path):
        copy.own("tokenizer.json").write_text("{}")
    with (
        pytest.raises(BundleError, match="does not name it"),
        bundle.files.held(bundle.files.directory / "other"),
    ):
        pass
