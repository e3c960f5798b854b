"""config.json and generation_config.json with what can't be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bundles import Rng
from .hostile import Hostile

Fields = dict[str, Any]

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


def config_field(hostile: Hostile, rng: Rng) -> str:
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


def any_config_field(hostile: Hostile, rng: Rng) -> str:
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


def rope_field(hostile: Hostile, rng: Rng) -> str:
    path = hostile.directory / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.get("rope_parameters")
    if rope is None:
        return config_field(hostile, rng)
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


def config_text(hostile: Hostile, rng: Rng) -> str:
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


def generation_config(hostile: Hostile, rng: Rng) -> str:
    texts = [b"", b"[]", b'{"eos_token_id": 1e400}', b'{"eos_token_id": [99999999999]}', b"\xff"]
    texts += [b'{"eos_token_id": "x"}', b'{"eos_token_id": -7}', b"[" * 100_000]
    text = texts[rng.integers(len(texts))]
    (hostile.directory / "generation_config.json").write_bytes(text)
    return f"generation_config.json = {text[:40]!r}"
