"""Logs as they may come."""

from __future__ import annotations

from pathlib import Path

import pytest

from ojfa_export.errors import LogError
from ojfa_export.promises.drift.log import Request, read_logs

DOMAINS = ("code", "docs")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_are_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.log", "\ufeffdef f(\r\n\n  x = é\u2028y\n")
    assert read_logs([path], DOMAINS) == [
        Request(f"{path}, line 1", "def f(", True, None),
        Request(f"{path}, line 3", "  x = é\u2028y", True, None),
    ]


def test_json_lines_and_named_logs(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.jsonl",
        '{"prompt": "a\\nb", "domain": "code"}\n\n{"text": "c"}\n{"text": "d", "domain": null}\n',
    )
    second = write(tmp_path / "b.ndjson", '{"prompt": "e"}\n{"prompt": "f", "domain": "docs"}')
    found = read_logs([first, Path(f"docs={second}")], DOMAINS)
    assert [(each.content, each.generate, each.domain) for each in found] == [
        ("a\nb", True, "code"),
        ("c", False, None),
        ("d", False, None),
        ("e", True, "docs"),
        ("f", True, "docs"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.log", "", "is empty"),
        ("a.log", " \n\t\n", "is empty"),
        ("a.log", b"ab\xff", "is not text: byte 2 is not UTF-8"),
        ("a.log", "a\0b", "is binary"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"prompt": "a"}\nb', "line 2: not JSON"),
        ("a.jsonl", "[1]", "line 1: not a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '{"prompt": "a", "user": "x"}', "line 1: unknown field 'user'"),
        ("a.jsonl", '{"prompt": 3}', "line 1: 'prompt' is no string"),
        ("a.jsonl", '{"prompt": null}', "line 1: 'prompt' is no string"),
        ("a.jsonl", '{"prompt": "a", "domain": 3}', "line 1: 'domain' is no string"),
        ("a.jsonl", '{"domain": "code"}', "line 1: it has neither 'prompt' nor 'text'"),
        ("a.jsonl", '{"prompt": "a", "text": "a"}', "line 1: it has both 'prompt' and 'text'"),
        ("a.jsonl", '{"text": ""}', "line 1: 'text' is empty"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: 'text' holds half a surrogate pair"),
        (
            "a.jsonl",
            '{"text": "a", "domain": "poems"}',
            "line 1: nothing was promised of domain 'poems'",
        ),
    ],
)
def test_logs_that_are_none(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(LogError, match=message.replace("(", r"\(")) as caught:
        read_logs([write(tmp_path / name, content)], DOMAINS)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


def test_domains_that_contradict_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "domain": "docs"}')
    with pytest.raises(LogError, match="domain 'docs' in a log that was given as 'code'"):
        read_logs([Path(f"code={path}")], DOMAINS)
    with pytest.raises(LogError, match=r"log .*none\.log can't be read: No such file"):
        read_logs([Path(f"code={tmp_path / 'none.log'}")], DOMAINS)
    with pytest.raises(LogError, match="can't be read"):
        read_logs([tmp_path], DOMAINS)
