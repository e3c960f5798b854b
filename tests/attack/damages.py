"""Random damage to a bundle whose digests stay as they were: every command must refuse it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from .bundles import SUBJECTS, VECTORS, Case, Rng, copy_subject
from .judge import Must

COUNT = 400
MANIFEST = "manifest.json"
_LARGE = 1 << 30


def make(number: int, rng: Rng, directory: Path) -> Case:
    """A bundle with one random damage; the kinds take turns."""
    subject = SUBJECTS[rng.integers(len(SUBJECTS))]
    bundle = copy_subject(subject, directory)
    what = DAMAGES[number % len(DAMAGES)](bundle, rng)
    harmless = _says_the_same(bundle, VECTORS / bundle.name)
    return Case(subject, bundle, f"{subject}: {what}", Must.ANY if harmless else Must.REFUSE)


def _says_the_same(bundle: Path, original: Path) -> bool:
    """Whether no more than white space of the manifest changed."""
    names = _files(bundle)
    if names != _files(original) or _entries(bundle) != _entries(original):
        return False
    for name in names:
        if (bundle / name).stat().st_size > _LARGE:
            return False
        now, before = (bundle / name).read_bytes(), (original / name).read_bytes()
        if now != before:
            if name != MANIFEST:
                return False
            try:
                if json.loads(now) != json.loads(before):
                    return False
            except (ValueError, RecursionError):
                return False
    return True


def _entries(bundle: Path) -> int:
    return sum(not path.is_dir() for path in bundle.rglob("*"))


def _files(bundle: Path) -> list[str]:
    return sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    )


def _pick(bundle: Path, rng: Rng) -> Path:
    """A random file; the manifest as often as all others in one of three."""
    names = _files(bundle)
    return bundle / (MANIFEST if rng.random() < 1 / 3 else names[rng.integers(len(names))])


def _flip(bundle: Path, rng: Rng) -> str:
    path = _pick(bundle, rng)
    data = bytearray(path.read_bytes())
    at, bits = int(rng.integers(len(data))), int(rng.integers(1, 256))
    data[at] ^= bits
    path.write_bytes(data)
    return f"{path.name}: byte {at} ^ {bits:#x}"


def _truncate(bundle: Path, rng: Rng) -> str:
    path = _pick(bundle, rng)
    data = path.read_bytes()
    size = 0 if rng.random() < 0.2 else int(rng.integers(len(data)))
    path.write_bytes(data[:size])
    return f"{path.name}: cut to {size} of {len(data)} bytes"


def _extend(bundle: Path, rng: Rng) -> str:
    path = _pick(bundle, rng)
    more = [b"\0", b"\n", b"}", rng.bytes(64), b" " * (1 << 20)][rng.integers(5)]
    path.write_bytes(path.read_bytes() + more)
    return f"{path.name}: {len(more)} bytes {more[:4]!r}… more"


def _grow(bundle: Path, rng: Rng) -> str:
    """A sparse file of a terabyte, in place of a file."""
    path = _pick(bundle, rng)
    with contextlib.suppress(OSError):
        os.truncate(path, 1 << 40)
    return f"{path.name}: a sparse file of {path.stat().st_size} bytes"


def _swap(bundle: Path, rng: Rng) -> str:
    one, other = _pick(bundle, rng), _pick(bundle, rng)
    aside = bundle / "aside"
    one.rename(aside)
    (other if other != one else aside).rename(one)
    if aside.exists():
        aside.rename(other)
    return f"{one.name} and {other.name} swapped"


def _remove(bundle: Path, rng: Rng) -> str:
    path = _pick(bundle, rng)
    path.unlink()
    return f"{path.name} removed"


def _rename(bundle: Path, rng: Rng) -> str:
    path = _pick(bundle, rng)
    names = [f"{path.name}.old", f".{path.name}", path.name.upper(), "é", "a\nb", "\x1b[31mred"]
    name = os.fsencode(names[rng.integers(len(names))]) if rng.random() < 0.8 else b"x\xff"
    os.rename(path, os.path.join(os.fsencode(path.parent), name))  # noqa: PTH104, PTH118
    return f"{path.name} renamed to {name!r}"


def _add(bundle: Path, rng: Rng) -> str:
    folders = [bundle, *sorted(path for path in bundle.rglob("*") if path.is_dir())]
    folder = folders[rng.integers(len(folders))]
    name = [b".hidden", b"extra.bin", b"a\nb", b"\xff\xfe", b"manifest.json.bak"][rng.integers(5)]
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:  # noqa: PTH118, PTH123
        file.write(rng.bytes(8))
    return f"{folder.name}: file {name!r} added"


def _link(bundle: Path, rng: Rng) -> str:
    """A link: to the same bytes elsewhere, to itself, to nothing, or to a device."""
    path = _pick(bundle, rng)
    kept = bundle.with_name("kept")
    path.rename(kept)
    targets = [str(kept), path.name, "nowhere", "/dev/zero", "/dev/stdin", "/", ".."]
    target = targets[rng.integers(len(targets))]
    path.symlink_to(target)
    return f"{path.name} is a link to {target}"


def _folder(bundle: Path, rng: Rng) -> str:
    path = _pick(bundle, rng)
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def _folder_for_folder(bundle: Path, rng: Rng) -> str:
    """A folder replaced by a link to itself elsewhere, a file, a loop, or the whole bundle."""
    if rng.random() < 0.25:
        shutil.rmtree(bundle)
        bundle.write_bytes(b"no folder")
        return "the bundle is a file"
    folder = bundle / ["graphs", "engines"][rng.integers(2)]
    kept = bundle.with_name("kept")
    folder.rename(kept)
    if rng.random() < 0.5:
        folder.symlink_to(kept)
        return f"{folder.name} is a link to a folder"
    folder.write_bytes(b"")
    return f"{folder.name} is a file"


def _special(bundle: Path, rng: Rng) -> str:
    """A FIFO, a socket or a device in place of a file, or beside it."""
    path = _pick(bundle, rng)
    if rng.random() < 0.7:
        path.unlink()
    else:
        path = path.with_name("more")
    kind = make_special(path, rng)
    return f"{path.name} is a {kind}"


def make_special(path: Path, rng: Rng) -> str:
    """Makes a special file of a random kind; a device only where that is allowed, else a FIFO."""
    kind = ["FIFO", "socket", "device"][rng.integers(3)]
    if kind == "socket":
        _bind(path)
    elif kind == "device":
        minor = [3, 5, 7][rng.integers(3)]  # null, zero, full
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, minor))
        except PermissionError:
            kind = "FIFO"
            os.mkfifo(path)
    else:
        os.mkfifo(path)
    return kind


def _bind(path: Path) -> None:
    """A socket, bound from within its folder: paths of sockets are short."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


DAMAGES: tuple[Callable[[Path, Rng], str], ...] = (
    _flip,
    _special,
    _truncate,
    _extend,
    _flip,
    _swap,
    _remove,
    _rename,
    _add,
    _link,
    _folder,
    _special,
    _folder_for_folder,
    _grow,
)
