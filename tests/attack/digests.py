"""Manifests edited as text or values, with digests made anew."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ojfa_export.bundle.manifest import manifest_digest

MANIFEST = "manifest.json"


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest's values, and makes digests and sizes of all files anew."""
    fields = json.loads((bundle / MANIFEST).read_text())
    change(fields)
    for name, entry in fields["files"].items():
        path = bundle / name
        if path.is_file():
            data = path.read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_signed(bundle, fields)


def redigest(bundle: Path) -> None:
    """Makes the digests of changed files anew."""
    edit_manifest(bundle, lambda fields: None)


def write_signed(bundle: Path, fields: dict[str, Any]) -> None:
    """Writes a manifest with its own digest."""
    fields["digest"] = manifest_digest(fields)
    (bundle / MANIFEST).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def write_raw(bundle: Path, fields: dict[str, Any], marker: str, raw: bytes) -> None:
    """Writes a manifest whose one string `marker` becomes raw bytes, with its digest if it has one.

    The digest is that of what Python reads; JSON that Python can't read keeps the old one.
    """
    text = json.dumps(fields, indent=2, sort_keys=True).encode()
    text = text.replace(json.dumps(marker).encode(), raw)
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
        text = text.replace(fields["digest"].encode(), manifest_digest(json.loads(text)).encode())
    (bundle / MANIFEST).write_bytes(text)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, but of each list only the first and the last entry's."""
    found = [path] if path else []
    if isinstance(node, dict):
        for key, child in node.items():
            found += places(child, (*path, key))
    elif isinstance(node, list):
        for index in sorted({0, len(node) - 1}) if node else ():
            found += places(node[index], (*path, index))
    return found


def owner_of(fields: Any, place: tuple[Any, ...]) -> Any:
    """The dict or list that holds the place's last key."""
    for key in place[:-1]:
        fields = fields[key]
    return fields


def equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same, types included; NaN is itself."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other
