"""Where output goes: terminals are shown what they would obey, and readers may leave."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ojfa_export.cli.console import Console
from ojfa_export.cli.errors import report
from ojfa_export.cli.progress import Bars
from ojfa_export.errors import OjfaError

# Of every kind: C0 with escape and carriage return, DEL, C1, and both sorts of bidi controls.
HOSTILE = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) + (
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
HARMLESS = "tab\t, newline\n, é, 漢, \u200d, \U0001f600, שלום"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _said(stream_type: type[io.StringIO], speak: Callable[[], object]) -> str:
    """What is written to standard output, then to standard error."""
    out, err = stream_type(), stream_type()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        speak()
    return out.getvalue() + err.getvalue()


WAYS = {
    "write": lambda console, text: console.write(text),
    "repeat": lambda console, text: console.repeat(text),
    "print": lambda console, text: console.print(text),
    "note": lambda console, text: console.note(text),
    "error": lambda console, text: report(OjfaError(text, hint=text), console),
    "bug": lambda console, text: report(ValueError(text), console),
    "heading": lambda console, text: console.heading(text),
    "table": lambda console, text: console.table((text, "b"), [(text, text)]),
    "facts": lambda console, text: console.facts({text: text}),
}


# The escapes that this program styles its own words with.
STYLES = ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m")


@pytest.mark.parametrize("way", WAYS)
def test_a_terminal_is_shown_what_it_would_obey(way: str) -> None:
    for character in HOSTILE:
        text = f"a{character}b"
        shown = _said(Terminal, lambda text=text: WAYS[way](Console(), text))
        assert text.encode("unicode_escape").decode() in shown
        for style in STYLES:
            shown = shown.replace(style, "")
        assert character not in shown


@pytest.mark.parametrize("way", ["write", "repeat", "print", "note", "error", "bug"])
def test_a_pipe_gets_text_as_it_is(way: str) -> None:
    text = f"a{HOSTILE}b"
    assert text in _said(io.StringIO, lambda: WAYS[way](Console(), text))


@pytest.mark.parametrize("way", ["write", "print", "note", "error"])
def test_what_does_no_harm_stays(way: str) -> None:
    said = HARMLESS.replace("\n", "\\n") if way == "error" else HARMLESS  # an error is one line
    assert said in _said(Terminal, lambda: WAYS[way](Console(), HARMLESS))


def test_bars_are_shown_no_commands() -> None:
    def show() -> None:
        with Bars().task("a\x1b]0;title\x07\u202eb", 1, "blocks") as task:
            task.advance()

    assert r"a\x1b]0;title\x07\u202eb" in _said(Terminal, show)


def test_json_is_escaped() -> None:
    said = _said(Terminal, lambda: Console(json=True).emit({"text": HOSTILE}))
    assert said.replace("\n", "").isascii()
    assert said.replace("\n", "").isprintable()
    assert json.loads(said) == {"text": HOSTILE}


@pytest.mark.parametrize(
    ("command", "gone", "status"),
    [
        ("run {bundle} -p 'def main' --exit full", "stdout", 141),
        ("run {bundle} -p a -p b --json", "stdout", 141),
        ("inspect {bundle} --json", "stdout", 141),
        ("inspect {bundle} -v", "stdout", 141),
        ("--help", "stdout", 141),
        ("inspect none --json", "stdout", 1),
        ("run {bundle} -p a --exit full", "stderr", 141),
        ("inspect none", "stderr", 1),
    ],
)
def test_reader_that_went_away(tiny_bundle: Path, command: str, gone: str, status: int) -> None:
    """As for `cat`: no word, and the status that a shell gives a program ended by SIGPIPE."""
    words = shlex.split(command.format(bundle=shlex.quote(str(tiny_bundle))))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, gone: writer}
        done = subprocess.run(
            [sys.executable, "-m", "ojfa_export", *words], **streams, text=True, check=False
        )
    finally:
        os.close(writer)
    assert done.returncode == status
    told = (done.stderr or "").splitlines()
    assert [line.partition(":")[0] for line in told] == (["error", "hint"] if told else [])
    assert bool(told) == (status == 1 and gone == "stdout")


def test_stream_that_is_cut_off(tiny_bundle: Path, tmp_path: Path) -> None:
    """A reader that leaves in the middle of a generation ends it."""
    program = (
        "from ojfa_export.runtime import generation, model\n"
        "def endless(*_):\n"
        "    while True:\n"
        "        yield generation.Token(0, 5, 'x' * 100, 4, None)\n"
        "model.generate_tokens = endless\n"
        "from ojfa_export.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, "run", str(tiny_bundle), "-p", "a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"a"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_closed_streams_are_no_files(tmp_path: Path) -> None:
    """Else a file opened next has a closed stream's number, and native code writes into it."""
    program = (
        "import os, sys\n"
        "from ojfa_export.cli import app\n"
        "app._replace_closed_streams()\n"
        "descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "sys.exit(descriptor <= 2)\n"
    )
    command = f"{sys.executable} -c '{program}' '{tmp_path / 'file'}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=os.environ, check=False).returncode == 0
