"""Calibration text: what is refused and why, and windows that never overlap."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import _tokenizer

from ojfa_export.errors import CalibrationError
from ojfa_export.models.calibration_text import (
    CalibrationText,
    make_windows,
    read_text,
    shipped_text,
)


class Letters:
    """A tokenizer whose tokens are the text's code points."""

    class Encoding:
        def __init__(self, text: str) -> None:
            self.ids = [ord(character) for character in text]

    def encode(self, text: str) -> Encoding:
        return self.Encoding(text)

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[Encoding]:
        assert add_special_tokens
        return [self.Encoding(text) for text in texts]


LETTERS: Any = Letters()


def text_of(*documents: str) -> CalibrationText:
    return CalibrationText("text", documents, "0" * 64, sum(map(len, documents)))


def refused(path: Path, match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as caught:
        read_text(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"text\xff\xfe", "is not text: byte 4 is not UTF-8"),
        ("é".encode("utf-16"), "is not UTF-8"),
        (b"\x7fELF\0\0\0", "is binary"),
    ],
)
def test_file_that_is_no_text(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    refused(path, match)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", "can't be read: No such file")
    refused(tmp_path, "can't be read: Is a directory")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        ('"text"', "line 2: not a JSON object"),
        ("null", "line 2: not a JSON object"),
        ('{"txt": "a"}', "line 2: not a JSON object with a 'text' field"),
        ('{"text": 5}', "line 2: 'text' is no string"),
        ('{"text": null}', "line 2: 'text' is no string"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half a surrogate pair"),
        ('{"text": ' + "1" * 5000 + "}", "line 2: not a JSON object"),
        ("[" * 100_000, "line 2: not a JSON object"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_line_of_jsonl(tmp_path: Path, line: str, match: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    refused(path, match)


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    documents = [*documents, "line\u2028separator\x85\x0b"]
    path = tmp_path_factory.mktemp("jsonl") / "text.jsonl"
    for ascii_only, end in ((True, "\n"), (False, "\r\n"), (False, "\n\n")):
        lines = [json.dumps({"text": d, "id": 1}, ensure_ascii=ascii_only) for d in documents]
        path.write_bytes(end.join(lines).encode())
        read = read_text(path)
        assert read.documents == tuple(documents)
        assert read.size == path.stat().st_size


def test_empty_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('\n{"text": ""}\n\n')
    refused(path, "is empty")


def test_too_little_text_says_how_much() -> None:
    text = text_of("def f(x): return x\n" * 4)
    with pytest.raises(CalibrationError, match="tokens in whole windows of 16; fitting needs 128"):
        make_windows([text], _tokenizer(), 16, 1024, 128)
    with pytest.raises(CalibrationError) as caught:
        make_windows([text], LETTERS, 16, 1024, 128)
    # As many letters as the hint asks for are enough.
    hint = str(caught.value.hint)
    count = int("".join(character for character in hint if character.isdigit()))
    assert 128 < count < 400
    more = text_of("x" * (count + 16))
    assert make_windows([more], LETTERS, 16, 1024, 128).fit.size >= 128


def test_too_few_tokens_asked_for() -> None:
    text = text_of("x" * 10_000)
    with pytest.raises(CalibrationError, match="64 calibration tokens are too few") as caught:
        make_windows([text], LETTERS, 16, 64, 128)
    assert caught.value.hint == "use --calibration-tokens 160 or more"
    assert make_windows([text], LETTERS, 16, 160, 128).fit.size >= 128


@given(
    sources=st.integers(1, 3),
    length=st.integers(1, 64),
    tokens=st.integers(1, 300),
    needed=st.integers(100, 400),
)
def test_the_hint_of_too_few_tokens_is_enough(
    sources: int, length: int, tokens: int, needed: int
) -> None:
    texts = [text_of("x" * 10_000)] * sources
    with contextlib.suppress(CalibrationError):
        make_windows(texts, LETTERS, length, tokens, needed)
        return  # enough as it is
    with pytest.raises(CalibrationError) as caught:
        make_windows(texts, LETTERS, length, tokens, needed)
    assert caught.value.hint is not None
    enough = int(caught.value.hint.removeprefix("use --calibration-tokens ").split()[0])
    assert make_windows(texts, LETTERS, length, enough, needed).fit.size >= needed


@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    length=st.integers(1, 20),
    tokens=st.integers(1, 1500),
)
def test_fit_and_held_out_never_overlap(sizes: list[int], length: int, tokens: int) -> None:
    # Every token is a code point of its own, so that a token tells where it came from.
    starts = np.cumsum([0x10000, *sizes])
    texts = [
        text_of("".join(map(chr, range(start, start + size))))
        for start, size in zip(starts, sizes, strict=False)
    ]
    try:
        windows = make_windows(texts, LETTERS, length, tokens, 1)
    except CalibrationError:
        # Only where no source has as many as two windows, or one was all that was asked for.
        assert max(min(size // length, -(-tokens // (len(sizes) * length))) for size in sizes) < 2
        return
    both = np.concatenate([windows.fit, windows.held_out])
    assert both.dtype == np.int32
    assert np.unique(both).size == both.size
    np.testing.assert_array_equal(np.diff(both, axis=1), 1)
    for start, size in zip(starts, sizes, strict=False):
        fit, held_out = (
            part[(part >= start) & (part < start + size)]
            for part in (windows.fit, windows.held_out)
        )
        assert not fit.size or fit.max() < held_out.min()
        assert held_out.size or size < length
    assert len(both) <= len(sizes) * -(-tokens // (len(sizes) * length))


def test_every_source_has_its_share() -> None:
    texts = [text_of("a" * 1000), text_of("b" * 1000), text_of("c" * 30)]
    windows = make_windows(texts, LETTERS, 10, 600, 1)
    assert [int((windows.fit == ord(c)).sum()) for c in "abc"] == [150, 150, 20]
    assert [int((windows.held_out == ord(c)).sum()) for c in "abc"] == [50, 50, 10]


def test_text_that_ships_can_be_read() -> None:
    assert len(shipped_text()) >= 2
    for path in shipped_text():
        assert read_text(path).size > 10_000
