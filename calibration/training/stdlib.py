"""The source of Python's standard library, which every Python installation has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calibration.training.corpus import Document

# Third-party code, generated tables, and test data made to be unusual rather than typical.
_EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "encodings", "pydoc_data", "idle_test", "lib2to3/tests", "encoded_modules"}
)
_EXCLUDED_NAMES = ("_sysconfigdata", "entities.py", "stringprep.py", "re_tests.py")
_MAX_DIGIT_SHARE = 0.12  # above it a file is a table of numbers: ordinary code has 1-5 %
_MAX_MEAN_LINE_LENGTH = 100


def read_stdlib(root: Path) -> Iterator[Document]:
    """Yields the ordinary Python source below the standard library's directory `root`."""
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).as_posix()
        text = None if _is_excluded(relative) else read_text(path)
        if text is not None:
            yield Document(relative, text)


def read_text(path: Path) -> str | None:
    """Text with LF line ends; None for what is no UTF-8, empty, or looks like a table."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    if not text.strip() or "\0" in text:
        return None
    digits = sum(map(str.isdigit, text)) / len(text)
    mean_line = len(text) / (text.count("\n") + 1)
    return None if digits > _MAX_DIGIT_SHARE or mean_line > _MAX_MEAN_LINE_LENGTH else text


def _is_excluded(relative: str) -> bool:
    directories, _, name = f"/{relative}".rpartition("/")
    return name.startswith(_EXCLUDED_NAMES) or any(
        f"/{directory}/" in f"{directories}/" for directory in _EXCLUDED_DIRECTORIES
    )
