"""Hostile checkpoints: `build --dry-run` refuses what `build` would, and nothing wrong is built.

Where `--dry-run` accepts a checkpoint, `build` may not refuse it for what a look at the files could
have told (`Hostile.late`: NaN among the weights is found when they are read). What is built must
pass `verify`; what must not be built at all says so (`Hostile.refuse`).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundles import Rng, Verdict
from .child import run_cli, run_forked
from .damages import make_special
from .hostile_tokenizers import spoil_tokenizer
from .judge import Fault, judge_outcome

COUNT = 120
BASES = {"llama-gqa": 1, "gpt2": 1, "phi3-longrope": 1, "llama-tied": 3}  # name: shards
BUILD_SECONDS = 40.0
Fields = dict[str, Any]


@dataclass
class Hostile:
    """A checkpoint made hostile.

    Attributes:
        directory: The checkpoint.
        refuse: Whether it must not be built.
        late: Whether only reading the weights shows what is wrong.
        output: Where to build; a path that can't be encoded is one of the attacks.
    """

    directory: Path
    output: str
    refuse: bool = True
    late: bool = False


def make_bases(directory: Path) -> None:
    """Writes the sound checkpoints; in a process of its own, which may import torch."""

    def body() -> None:
        from tiny_models import make_checkpoint

        for name, shards in BASES.items():
            make_checkpoint(name, directory / name, seed=13, shards=shards)

    outcome = run_forked("make checkpoints", body, seconds=300)
    assert outcome.status == 0, outcome.stderr
    (directory / "text.txt").write_text(_text(), encoding="utf-8")


def _text() -> str:
    import argparse
    import inspect

    return inspect.getsource(argparse)


def build_arguments(checkpoint: str, output: str, text: Path, *more: str) -> list[str]:
    """A build of a tiny checkpoint that takes seconds."""
    return [
        *("-q", "build", checkpoint, "-o", output, "--rank", "8", "--shortcut", "ojfa"),
        *("--calibration-data", str(text), "--calibration-tokens", "1024"),
        *("--max-cache-length", "64", "--skip-verification", *more),
    ]


def attack(number: int, rng: Rng, directory: Path, bases: Path) -> Verdict:
    """Makes a checkpoint hostile, and judges what `build` says of it."""
    name = sorted(BASES)[rng.integers(len(BASES))]
    hostile = Hostile(directory / name, str(directory / "out.ojfa"))
    shutil.copytree(bases / name, hostile.directory)
    what = ATTACKS[number % len(ATTACKS)](hostile, rng)
    verdict = Verdict(f"{name}: {what}", "refused")
    checkpoint = str(hostile.directory)

    def build(*more: str, seconds: float) -> int | None:
        arguments = build_arguments(checkpoint, hostile.output, bases / "text.txt", *more)
        outcome = run_cli(*arguments, seconds=seconds)
        verdict.faults += judge_outcome(outcome)
        return outcome.status

    planned = build("--dry-run", seconds=10)
    if planned not in (0, None) and number % 4:
        return verdict
    built = build(seconds=BUILD_SECONDS)
    output = Path(hostile.output)
    partial = output.with_name(f"{output.name}.partial")
    if built == 0:
        _judge_built(verdict, hostile)
    elif planned == 0 and not hostile.late:
        verdict.faults.append(Fault("silently wrong", "--dry-run takes what build refuses"))
    elif planned != 0 and os.path.lexists(partial):
        verdict.faults.append(Fault("untidy", f"{partial.name} is left behind"))
    return verdict


def _judge_built(verdict: Verdict, hostile: Hostile) -> None:
    verdict.ended = "built"
    if hostile.refuse:
        verdict.faults.append(Fault("silently wrong", "it is built, which must be refused"))
        return
    outcome = run_cli("-q", "verify", hostile.output)
    verdict.faults += judge_outcome(outcome)
    if outcome.status != 0:
        said = (outcome.stdout + outcome.stderr)[-300:]
        verdict.faults.append(Fault("silently wrong", f"it is built, but not verified: {said}"))


INTEGERS = (
    b"-1",
    b"0",
    b"1.5",
    b'"x"',
    b"2147483648",
    b"9223372036854775808",
    b"1e400",
    b"[]",
    b"true",
)
NUMBERS = (
    b"-1.0",
    b"NaN",
    b"Infinity",
    b"1e400",
    b"1" + b"0" * 400,
    b'"x"',
    b"[]",
    b"-1e-5",
    b"true",
)
IDS = (
    b"-1",
    b"320",
    b"2147483648",
    b"9223372036854775808",
    b"1.5",
    b'"x"',
    b"[-1]",
    b'["x"]',
    b"[0, 99999]",
)
_INTEGER_FIELDS = ("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")
_INTEGER_FIELDS += ("num_attention_heads", "n_head", "intermediate_size", "num_key_value_heads")
_NUMBER_FIELDS = ("rms_norm_eps", "layer_norm_epsilon")


def _config_field(hostile: Hostile, rng: Rng) -> str:
    """A field that matters gets a value that can't be right."""
    path = hostile.directory / "config.json"
    fields = json.loads(path.read_text())
    kind = rng.integers(3)
    if kind == 2:
        return _set(path, fields, "eos_token_id", IDS[rng.integers(len(IDS))])
    names, values = ((_INTEGER_FIELDS, INTEGERS), (_NUMBER_FIELDS, NUMBERS))[kind]
    present = [name for name in names if name in fields]
    return _set(
        path, fields, present[rng.integers(len(present))], values[rng.integers(len(values))]
    )


def _any_config_field(hostile: Hostile, rng: Rng) -> str:
    """Any field gets any value; it may not matter, or be another model that can be built."""
    path = hostile.directory / "config.json"
    fields = json.loads(path.read_text())
    hostile.refuse = False
    values = (
        *INTEGERS,
        *NUMBERS,
        b"null",
        b"1",
        b"{}",
        b'""',
        b'"\\ud800"',
        b'"a\\u001b[2Jb"',
        b"1e308",
    )
    names = sorted(fields)
    return _set(path, fields, names[rng.integers(len(names))], values[rng.integers(len(values))])


def _rope_field(hostile: Hostile, rng: Rng) -> str:
    path = hostile.directory / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.get("rope_parameters")
    if rope is None:
        return _config_field(hostile, rng)
    names = sorted(rope)
    name = names[rng.integers(len(names))]
    value = (b"-1", b"NaN", b"1e400", b'"x"', b"[]", b"{}", b"0", b"[1e400]")[rng.integers(8)]
    rope[name] = "@"
    text = json.dumps(fields).encode().replace(b'"@"', value)
    path.write_bytes(text)
    # transformers and this reader leave out what a type of rotation doesn't ask for.
    hostile.refuse = name == "rope_theta"
    return f"rope {name} = {value!r}"


def _set(path: Path, fields: Fields, name: str, value: bytes) -> str:
    fields[name] = "@"
    path.write_bytes(json.dumps(fields).encode().replace(b'"@"', value))
    return f"{name} = {value[:20]!r}"


def _config_text(hostile: Hostile, rng: Rng) -> str:
    path = hostile.directory / "config.json"
    data = path.read_bytes()
    texts = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "not UTF-8": data.replace(b"model_type", b"model\xff"),
        "nested deeply": b"[" * 100_000,
        "a list": b"[]",
        "UTF-16": data.decode().encode("utf-16"),
        "large": b" " * (64 << 20),
        "of doubled keys": data.replace(b"{", b'{"model_type": "mamba", "model_type": "gpt2", ', 1),
    }
    how = sorted(texts)[rng.integers(len(texts))]
    hostile.refuse = how != "of doubled keys"
    path.write_bytes(texts[how])
    return f"config.json is {how}"


def _weight_file(hostile: Hostile, rng: Rng) -> Path:
    paths = sorted(hostile.directory.glob("*.safetensors"))
    return paths[rng.integers(len(paths))]


def _tensors(hostile: Hostile, rng: Rng) -> str:
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


def _header(hostile: Hostile, rng: Rng) -> str:
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


def _index(hostile: Hostile, rng: Rng) -> str:
    path = hostile.directory / "model.safetensors.index.json"
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


def _special_file(hostile: Hostile, rng: Rng) -> str:
    paths = sorted(
        path for path in hostile.directory.iterdir() if path.suffix in (".json", ".safetensors")
    )
    path = paths[rng.integers(len(paths))]
    path.unlink()
    return f"{path.name} is a {make_special(path, rng)}"


def _folder_or_link(hostile: Hostile, rng: Rng) -> str:
    paths = sorted(
        path for path in hostile.directory.iterdir() if path.suffix in (".json", ".safetensors")
    )
    path = paths[rng.integers(len(paths))]
    path.unlink()
    target = ["", path.name, "nowhere", "/dev/zero", "/"][rng.integers(5)]
    if target:
        path.symlink_to(target)
    else:
        path.mkdir()
    return f"{path.name} is {'a link to ' + target if target else 'a folder'}"


def _names(hostile: Hostile, rng: Rng) -> str:
    """Names that are no UTF-8, or hold control characters; the checkpoint is sound."""
    name = os.fsdecode(
        [b"x\xff", b"a\nb", b"\x1b[31mred", "é\u202e".encode(), b"-rf"][rng.integers(5)]
    )
    what = ("checkpoint", "output", "file beside")[rng.integers(3)]
    hostile.refuse, hostile.late = False, True
    if what == "checkpoint":
        moved = hostile.directory.with_name(name)
        hostile.directory.rename(moved)
        hostile.directory = moved
    elif what == "output":
        hostile.output = str(Path(hostile.output).with_name(name))
    else:
        (hostile.directory / name).write_bytes(b"")
    return f"name of the {what}: {name!a}"


def _tokenizer(hostile: Hostile, rng: Rng) -> str:
    hostile.refuse = False
    return spoil_tokenizer(hostile.directory / "tokenizer.json", rng)


def _generation_config(hostile: Hostile, rng: Rng) -> str:
    texts = [b"", b"[]", b'{"eos_token_id": 1e400}', b'{"eos_token_id": [99999999999]}', b"\xff"]
    texts += [b'{"eos_token_id": "x"}', b'{"eos_token_id": -7}', b"[" * 100_000]
    text = texts[rng.integers(len(texts))]
    (hostile.directory / "generation_config.json").write_bytes(text)
    return f"generation_config.json = {text[:40]!r}"


ATTACKS: tuple[Callable[[Hostile, Rng], str], ...] = (
    _config_field,
    _tensors,
    _tokenizer,
    _header,
    _any_config_field,
    _special_file,
    _names,
    _config_field,
    _rope_field,
    _config_text,
    _tensors,
    _tokenizer,
    _index,
    _folder_or_link,
    _generation_config,
)
