"""Hostile values in the manifest: every field in turn, digests made anew where JSON allows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bundles import DESCRIBED_ONLY, SUBJECTS, VECTORS, Case, Rng, copy_subject
from .digests import MANIFEST, equal, owner_of, places, write_raw
from .judge import Must

COUNT = 700
_MARKER = "the hostile value goes here"
REMOVED = b"removed"
DOUBLED = b"doubled"
# As JSON text.
VALUES = (
    b"null",
    b"true",
    b"false",
    b"-1",
    b"0",
    b"1",
    b"-0.0",
    b"2147483647",
    b"2147483648",
    b"4294967296",
    b"9223372036854775807",
    b"9223372036854775808",
    b"18446744073709551616",
    b"1" + b"0" * 400,
    b"1" + b"0" * 5000,
    b"1e400",
    b"-1e400",
    b"1e308",
    b"5e-324",
    b"NaN",
    b"Infinity",
    b"0.5",
    b'""',
    b'"x"',
    b'"0"',
    b'"../../outside"',
    b'"/etc/passwd"',
    b'"' + b"long" * 250_000 + b'"',
    b'"\\u0000"',
    b'"\\u001b[31m\\u0007"',
    b'"a\\nb"',
    b'"\\ud800"',
    '"\u202e\u2028é"'.encode(),
    b'"\xff\xfe"',
    b'"\t"',
    b"[]",
    b"{}",
    b"[[]]",
    b"[null]",
    b"[-1]",
    b'{"": 0}',
    b'{"x": {"x": {}}}',
    b"[" * 900 + b"]" * 900,
    b"[" * 100_000 + b"]" * 100_000,
    b"[" + b"0," * 100_000 + b"0]",
    b'{"a": 1, "a": 2}',
    b"",
    REMOVED,
    DOUBLED,
)
# Fields by which a user may have chosen otherwise: they make another policy, not a broken bundle.
CHOICES = {"auto", "default", "promise", "cache", "eos_token_ids", "max_positions"}
WHOLE = (
    ("empty", b""),
    ("null", b"null"),
    ("a list", b"[]"),
    ("a string", b'"ojfa-bundle"'),
    ("cut", None),
    ("UTF-16", None),
    ("with a byte order mark", None),
    ("Latin-1", None),
    ("doubled", None),
    ("blanks", b" " * (32 << 20)),
    ("brackets", b"[" * (8 << 20)),
    ("zeros", b"\0" * 100_000),
    ("another version", None),
)


def make(number: int, rng: Rng, directory: Path) -> Case:
    """A bundle whose manifest has one hostile value; one of twelve is hostile as a whole."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    bundle = copy_subject(subject, directory)
    if number % 12 == 11:
        return _whole(subject, bundle, number // 12)
    fields = json.loads((bundle / MANIFEST).read_text())
    every = sorted(places(fields), key=str)
    place = every[(number * 7) % len(every)]
    raw = VALUES[rng.integers(len(VALUES))]
    before = json.loads(json.dumps(owner_of(fields, place)[place[-1]]))
    _put(bundle, fields, place, raw)
    must = Must.ANY if _is_json(bundle) else Must.REFUSE
    what = f"{subject}: {'.'.join(map(str, place))} = {_shown(raw)}"
    case = Case(subject, bundle, what, must, another=bool(CHOICES & set(place)))
    if DESCRIBED & set(place):
        case.one_runtime = DESCRIBED_ONLY
    if place == ("digest",) and not _still(bundle, before):
        case.must = Must.REFUSE
    return case


# What the C++ runtime takes from the graphs themselves, or not at all.
DESCRIBED = {"inputs", "outputs", "axes", "backend"}


def _is_json(bundle: Path) -> bool:
    try:
        json.loads((bundle / MANIFEST).read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _put(bundle: Path, fields: Any, place: tuple[Any, ...], raw: bytes) -> None:
    owner, key = owner_of(fields, place), place[-1]
    if raw == REMOVED:
        del owner[key]
    elif raw == DOUBLED:
        if isinstance(owner, list):
            owner.append(owner[key])
        else:  # the first is another than the last, which Python takes
            value = json.dumps(owner[key]).encode()
            owner[key] = _MARKER
            raw = b"0,\n" + json.dumps(key).encode() + b": " + value
    else:
        owner[key] = _MARKER
    write_raw(bundle, fields, _MARKER, raw)


def _still(bundle: Path, before: Any) -> bool:
    """Whether the manifest's digest is what it was."""
    try:
        return equal(json.loads((bundle / MANIFEST).read_bytes())["digest"], before)
    except (ValueError, KeyError, RecursionError, TypeError):
        return False


def _whole(subject: str, bundle: Path, number: int) -> Case:
    what, data = WHOLE[number % len(WHOLE)]
    text = (VECTORS / bundle.name / MANIFEST).read_text()
    if data is None:
        data = {
            "cut": text[: len(text) // 2].encode(),
            "UTF-16": text.encode("utf-16"),
            "with a byte order mark": text.encode("utf-8-sig"),
            "Latin-1": text.replace('"vectors"', '"\xe9"').encode("latin-1"),
            "doubled": text.encode() * 2,
            "another version": text.replace('"format_version": 1', '"format_version": 2').encode(),
        }[what]
    (bundle / MANIFEST).write_bytes(data)
    # A byte order mark may be passed over, but by both runtimes or by none.
    must = Must.ANY if what == "with a byte order mark" else Must.REFUSE
    return Case(subject, bundle, f"{subject}: manifest.json is {what}", must)


def _shown(raw: bytes) -> str:
    text = ascii(raw.decode("utf-8", "backslashreplace"))
    return text if len(text) < 50 else f"{text[:30]}… ({len(raw)} bytes)"
