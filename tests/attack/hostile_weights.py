"""Weight files that are damaged, lie of what they hold, or hold what no model has."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .bundles import Rng
from .hostile import Hostile


def _weight_file(hostile: Hostile, rng: Rng) -> Path:
    paths = sorted(hostile.directory.glob("*.safetensors"))
    return paths[rng.integers(len(paths))]


def tensors(hostile: Hostile, rng: Rng) -> str:
    """A tensor of another dtype or shape, missing, or with NaN or infinity."""
    from safetensors.numpy import load_file, save_file

    path = _weight_file(hostile, rng)
    tensors = load_file(path)
    names = sorted(tensors)
    name = names[rng.integers(len(names))]
    how = [
        "int32",
        "int8",
        "bool",
        "float64",
        "flat",
        "larger",
        "scalar",
        "missing",
        "NaN",
        "inf",
        "huge",
    ]
    kind = how[rng.integers(len(how))]
    array = tensors[name]
    if kind in ("int32", "int8", "bool", "float64"):
        tensors[name] = array.astype(kind)
        hostile.refuse = kind != "float64"
    elif kind == "missing":
        del tensors[name]
    elif kind in ("NaN", "inf", "huge"):
        array.flat[rng.integers(array.size)] = {"NaN": np.nan, "inf": np.inf, "huge": 3e38}[kind]
        hostile.late, hostile.refuse = True, kind != "huge"
    else:
        grown = np.concatenate([array, array], axis=0)
        tensors[name] = {"flat": array.ravel(), "larger": grown, "scalar": array.ravel()[0]}[kind]
        hostile.refuse = kind != "flat" or array.ndim > 1
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return f"{name} is {kind}"


def header(hostile: Hostile, rng: Rng) -> str:
    """A header of safetensors that lies."""
    path = _weight_file(hostile, rng)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    entry = header[sorted(header.keys() - {"__metadata__"})[0]]
    how = [
        "length 2^63",
        "length 0",
        "offsets beyond",
        "offsets overlap",
        "negative shape",
        "huge shape",
    ]
    how += ["unknown dtype", "no JSON", "cut", "empty", "nested deeply", "extra bytes"]
    kind = how[rng.integers(len(how))]
    if kind == "offsets beyond":
        entry["data_offsets"] = [0, 2**62]
    elif kind == "offsets overlap":
        entry["data_offsets"][0] += 4
    elif kind == "negative shape":
        entry["shape"] = [-1]
    elif kind == "huge shape":
        entry["shape"] = [2**40, 2**40]
    elif kind == "unknown dtype":
        entry["dtype"] = "F3"
    text = json.dumps(header).encode()
    length = {"length 2^63": 2**63, "length 0": 0}.get(kind, len(text))
    if kind == "no JSON":
        text = b"x" * len(text)
    elif kind == "nested deeply":
        text = b"[" * 200_000
        length = len(text)
    made = struct.pack("<Q", length) + text + body
    made = {"cut": data[: len(data) // 2], "empty": b"", "extra bytes": data + b"more"}.get(
        kind, made
    )
    path.write_bytes(made)
    return f"safetensors header: {kind}"


def index(hostile: Hostile, rng: Rng) -> str:
    path = hostile.directory / "model.safetensors.index.json"
    whole = hostile.directory / "model.safetensors"
    if whole.exists():  # it would be taken, and the index left alone
        whole.rename(hostile.directory / "model-00001-of-00001.safetensors")
    shards = sorted(shard.name for shard in hostile.directory.glob("*.safetensors"))
    maps: list[tuple[str, Any]] = [
        ("a shard outside", {"model.norm.weight": "../../outside.safetensors"}),
        ("an absolute shard", {"model.norm.weight": "/etc/passwd"}),
        ("a list", ["x"]),
        ("numbers", {"model.norm.weight": 7}),
        ("null", None),
        ("a tensor that isn't there", {"no.such": shards[0]}),
        ("a folder", {"model.norm.weight": ".."}),
        ("empty", {}),
    ]
    what, value = maps[rng.integers(len(maps))]
    path.write_text(json.dumps({"metadata": {}, "weight_map": value}))
    return f"index: {what}"
