"""Calibration text: read, checked, and cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CalibrationError
from ojfa_export.models.tokenizer import encode, encode_all
from ojfa_export.system.paths import readable
from ojfa_export.system.pipes import read_named

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class CalibrationText:
    """One source of calibration text.

    Attributes:
        domain: The kind of text; sources may share one.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    size: int
    domain: str = ""


@dataclass(frozen=True)
class Windows:
    """Token windows, each run as a sequence of its own.

    Attributes:
        fit: [n, length] int32, for fitting.
        held_out: [m, length] int32, for measuring; from the end of each source.
        rest: Of each source, the windows between, which are for neither.
    """

    fit: Int32
    held_out: Int32
    rest: tuple[Int32, ...] = ()


def shipped_text() -> list[Path]:
    """The text that ships: Python code and documentation prose."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "_calibration" / "text", package.parent / "calibration" / "text"):
        if directory.is_dir():
            return sorted(directory.glob("*.txt"))
    raise CalibrationError(
        "the calibration text that ships is missing from this installation",
        hint="reinstall ojfa-export, or give --calibration-data FILE",
    )


def read_source(source: Path) -> CalibrationText:
    """Reads FILE, or DOMAIN=FILE; a file alone is a domain of its own, of its name without ending.

    Raises:
        CalibrationError: As `read_text`.
    """
    named = None if source.exists() else re.fullmatch(r"([\w][\w.+-]*)=(.+)", str(source))
    if named is None:
        return replace(read_text(source), domain=readable(source.stem))
    return replace(read_text(Path(named[2])), domain=named[1])


def read_text(path: Path) -> CalibrationText:
    """Reads a text file, or a JSONL file whose lines have a "text" field.

    Raises:
        CalibrationError: Missing, empty, binary, no file or pipe, a pipe that stays silent, or not
            JSONL where its name says so.
    """
    try:
        raw = read_named(path)
    except OSError as error:
        raise CalibrationError(
            f"calibration data {path} can't be read: {error.strerror or error}",
            hint="name a text file or a JSONL file with a 'text' field in each line",
        ) from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration data {path} is not text: byte {error.start} is not UTF-8",
            hint="name a text file in UTF-8",
        ) from error
    if "\0" in text:
        raise CalibrationError(f"calibration data {path} is binary", hint="name a text file")
    documents = _json_lines(path, text) if path.suffix == ".jsonl" else [text]
    if not any(document.strip() for document in documents):
        raise CalibrationError(
            f"calibration data {path} is empty", hint="give text like that of your users"
        )
    return CalibrationText(
        readable(path.name), tuple(documents), hashlib.sha256(raw).hexdigest(), len(raw)
    )


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    # Not splitlines: a JSON string may hold other line separators than this as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                f"calibration data {path}, line {number}: not a JSON object with a 'text' field",
                hint='each line should look like {"text": "..."}',
            ) from error
        if not isinstance(document, str):
            raise CalibrationError(
                f"calibration data {path}, line {number}: 'text' is no string",
                hint='each line should look like {"text": "..."}',
            )
        if any("\ud800" <= character <= "\udfff" for character in document):
            raise CalibrationError(
                f"calibration data {path}, line {number}: 'text' holds half a surrogate pair",
                hint="write the file as UTF-8, or with whole \\uXXXX pairs",
            )
        documents.append(document)
    return documents


def make_windows(
    texts: Sequence[CalibrationText], tokenizer: Tokenizer, length: int, tokens: int, needed: int
) -> Windows:
    """Cuts texts into windows, an equal share of each.

    Args:
        texts: The sources.
        tokenizer: The model's.
        length: Tokens in a window.
        tokens: Tokens wanted in all, fitting and held out; taken from the beginning of each
            source's two parts.
        needed: Tokens that fitting needs at least.

    Raises:
        CalibrationError: Fewer tokens than needed.
    """
    fit: list[NDArray[np.int32]] = []
    held_out: list[NDArray[np.int32]] = []
    rest: list[NDArray[np.int32]] = []
    share = -(-tokens // (len(texts) * length))  # windows of each source, rounded up
    for text in texts:
        ids = [token for each in encode_all(tokenizer, text.documents) for token in each]
        count = min(len(ids) // length, share)
        all_windows = np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)
        aside = max(1, round(count * HELD_OUT_SHARE))
        fit.append(all_windows[: count - aside])
        held_out.append(all_windows[len(all_windows) - aside :])
        rest.append(all_windows[max(0, count - aside) : max(0, len(all_windows) - aside)])
    windows = Windows(np.concatenate(fit), np.concatenate(held_out), tuple(rest))
    if windows.fit.size < needed or not len(windows.held_out):
        taken = windows.fit.size + windows.held_out.size
        if taken >= tokens:
            raise CalibrationError(
                f"{tokens} calibration tokens are too few: fitting needs {needed} and as many as "
                "a third of that held out",
                hint=f"use --calibration-tokens {_enough(len(texts), length, needed)} or more",
            )
        raise CalibrationError(
            f"the calibration text has {taken} tokens in whole windows of {length}; fitting "
            f"needs {needed} and as many as a third of that held out",
            hint=f"give about {_characters(texts, tokenizer, needed):,} characters of text or more",
        )
    return windows


def _enough(texts: int, length: int, needed: int) -> int:
    """Tokens that leave `needed` to fit on, as `make_windows` shares them out."""
    share = 2
    while texts * length * (share - max(1, round(share * HELD_OUT_SHARE))) < needed:
        share += 1
    return texts * length * share


def _characters(texts: Sequence[CalibrationText], tokenizer: Tokenizer, needed: int) -> int:
    sample = "".join(texts[0].documents)[:20_000]
    per_token = len(sample) / max(1, len(encode(tokenizer, sample)))
    return int(1.1 * needed / (1 - HELD_OUT_SHARE) * per_token)
