"""ONNX graphs whose external data lies outside the bundle, beyond its file, or has no length."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from .bundles import Rng
from .judge import Must


def _edit(path: Path, rng: Rng, change: Callable[[dict[str, str]], Any]) -> str:
    """Changes the entries of one external tensor of a graph."""
    model = onnx.load(path, load_external_data=False)
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    tensor = tensors[rng.integers(len(tensors))]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    change(entries)
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return f"{path.stem}: {tensor.name}"


def _graph(folder: Path, rng: Rng) -> Path:
    """A graph of the folder that has external data."""
    paths = [
        path
        for path in sorted(folder.glob("*.onnx"))
        if any(t.external_data for t in onnx.load(path, load_external_data=False).graph.initializer)
    ]
    return paths[rng.integers(len(paths))]


def _outside(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    """The same bytes, in a file beside the bundle: by a path up, absolute, or past a folder."""
    path, kind = _graph(folder, rng), int(rng.integers(3))

    def change(entries: dict[str, str]) -> None:
        weights = bundle / "graphs"  # engines refer to the same files as if they lay there
        outside = bundle.with_name("outside.bin")
        outside.write_bytes((weights / entries["location"]).read_bytes())
        up = os.path.relpath(outside, weights)
        entries["location"] = (up, str(outside), f"./../graphs/{up}")[kind]

    return f"{_edit(path, rng, change)} lies outside the bundle", Must.NAME


def _unnamed(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    """A file of the bundle that the graph's entry doesn't name as its weights."""

    def change(entries: dict[str, str]) -> None:
        target = (
            bundle / ("tokenizer.json", "manifest.json", "shortcut.safetensors")[rng.integers(3)]
        )
        entries["location"] = os.path.relpath(target, bundle / "graphs")
        entries["offset"] = "0"

    return f"{_edit(_graph(folder, rng), rng, change)} lies in no weight file", Must.ANY


def _no_length(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    """Legal ONNX: all that follows the offset, or as much as the shape needs."""
    what = _edit(_graph(folder, rng), rng, lambda entries: entries.pop("length", None))
    return f"{what} has no length", Must.ANY


def _no_offset(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    what = _edit(_graph(folder, rng), rng, lambda entries: entries.pop("offset", None))
    return f"{what} has no offset", Must.ANY


def _beyond(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    """An offset or a length beyond the file, negative, or no number."""
    values = ["1000000000", "9223372036854775807", "-4", "x", "", "18446744073709551616", "3"]
    value, key = values[rng.integers(len(values))], ("offset", "length")[rng.integers(2)]
    what = _edit(_graph(folder, rng), rng, lambda entries: entries.update({key: value}))
    return f"{what} has {key} {value!r}", Must.NAME


def _location(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    """A location that names no file."""
    values = ["", ".", "nowhere.bin", "/dev/zero", "block_00.bin\0", "a" * 5000, "..", "\x1b[2J"]
    value = values[rng.integers(len(values))]
    what = _edit(_graph(folder, rng), rng, lambda entries: entries.update(location=value))
    return f"{what} lies at {value!r:.20}", Must.NAME


def _another_place(folder: Path, bundle: Path, rng: Rng) -> tuple[str, Must]:
    """Another tensor of the same file: another model, which golden tokens and float64 may see."""
    what = _edit(_graph(folder, rng), rng, lambda entries: entries.update(offset="0"))
    return f"{what} begins at 0", Must.ANY


EXTERNAL_DATA: tuple[Callable[[Path, Path, Rng], tuple[str, Must]], ...] = (
    _outside,
    _outside,
    _beyond,
    _unnamed,
    _no_length,
    _no_offset,
    _location,
    _another_place,
)
