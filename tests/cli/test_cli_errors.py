"""Every kind of error: its words on standard error, its exit status, and in JSON a document."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ojfa_export import errors
from ojfa_export.backends import doctor
from ojfa_export.cli.console import Console
from ojfa_export.cli.errors import Interrupted

HINT_BUG = "hint: run it again with --debug and report what it prints\n"


def _interrupted_import() -> errors.BackendError:
    """What an interrupt becomes while a native module is loaded."""
    error = errors.BackendError("backend can't be used", hint="see the doctor")
    error.__cause__ = ImportError("initialization failed")
    error.__cause__.__context__ = KeyboardInterrupt()
    return error


def _os_error(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


CASES = {
    "failure": (errors.BundleError("it is broken"), 1, "error: it is broken\n"),
    "hint": (
        errors.CheckpointError("no shard", hint="get it"),
        1,
        "error: no shard\nhint: get it\n",
    ),
    "usage": (errors.UsageError("rank 0"), 2, "error: rank 0\n"),
    "verification": (errors.VerificationError("differs"), 3, "error: differs\n"),
    "interrupt": (KeyboardInterrupt(), 130, "\nerror: interrupted\n"),
    "interrupted import": (_interrupted_import(), 130, "error: interrupted\n"),
    "resumable": (
        Interrupted("interrupted", hint="again"),
        130,
        "error: interrupted\nhint: again\n",
    ),
    "full disk": (
        _os_error(errno.ENOSPC, "/some/file"),
        1,
        "error: no space left on /some/file\nhint: free some room and run the same command again\n",
    ),
    "full disk, unnamed": (
        _os_error(errno.ENOSPC),
        1,
        "error: no space left on the device that is written to\n"
        "hint: free some room and run the same command again\n",
    ),
    "permission": (
        _os_error(errno.EACCES, "/some/file"),
        1,
        "error: can't use /some/file: permission denied\n"
        "hint: check the path and its permissions\n",
    ),
    "memory": (MemoryError(), 1, "error: out of memory\nhint: use a machine with more\n"),
    "bug": (
        ValueError("surprise"),
        1,
        "error: internal error: ValueError: surprise (this is a bug)\n" + HINT_BUG,
    ),
    "end of file": (
        EOFError("short"),
        1,
        "\nerror: internal error: EOFError: short (this is a bug)\n" + HINT_BUG,
    ),
}


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("case", CASES)
def test_error(invoke, monkeypatch: pytest.MonkeyPatch, case: str, options) -> None:
    error, status, text = CASES[case]
    monkeypatch.setattr(doctor, "diagnose", lambda: _raise(error))
    result = invoke("doctor", *options)
    assert (result.exit_code, result.stderr) == (status, text)
    assert result.stdout == (_document(text, status) if options else "")


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(invoke, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: _raise(ValueError("surprise")))
    args = ("--debug", "doctor") if where == "before" else ("doctor", "--debug")
    result = invoke(*args)
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert "in _raise" in result.stderr
    assert result.stderr.endswith(HINT_BUG)


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["run"], "missing argument 'BUNDLE'", "run --help"),
        (["frobnicate"], "no such command 'frobnicate'", "--help"),
        (["inspect", "x", "--wrong"], "no such option", "inspect --help"),
        (["run", "x", "-p", "a", "--exit", "0"], "invalid value for '--exit': '0'", "run --help"),
        (["run", "x", "-p", "a", "--exit", "half"], "invalid value for '--exit'", "run --help"),
        (["run", "x", "-p", "a", "--max-new-tokens", "0"], "invalid value", "run --help"),
        (["build", "no-such-bundle"], "missing option '-o' / '--output'", "build --help"),
        (["build", "x", "-o", "y", "--precision", "int3"], "invalid value", "build --help"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_wrong_usage(invoke, args, message: str, hint: str, options) -> None:
    result = invoke(*args, *options)
    assert result.exit_code == 2
    assert result.stdout == (_document(result.stderr, 2) if options else "")
    first, last = result.stderr.splitlines()
    assert first.startswith(f"error: {message}")
    assert last == f"hint: see 'ojfa-export {hint}'"


def test_no_prompt(invoke) -> None:
    result = invoke("run", "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no prompt was given\nhint: give -p TEXT")


def test_missing_bundle(invoke, tmp_path: Path) -> None:
    result = invoke("run", tmp_path / "none", "-p", "a")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'none'} is not a bundle")
    assert "\nhint: " in result.stderr


def _run_doctor(stdout) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ojfa_export", "doctor"]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_standard_output() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = _run_doctor(full)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "error: no space left on the device that is written to",
        "hint: free some room and run the same command again",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_error_that_can_t_be_told() -> None:
    command = f"{sys.executable} -m ojfa_export inspect none --json 2>/dev/full >/dev/full"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 1


@pytest.mark.parametrize("args", [["--json"], ["--json", "run"], ["doctor", "--json", "--x"]])
def test_json_is_understood_wherever_it_stands(invoke, args: list[str]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == _document(result.stderr, 2)


def test_json_of_another_option_is_none(invoke) -> None:
    result = invoke("run", "none", "-p", "--json")
    assert (result.exit_code, result.stdout) == (1, "")


def test_one_document_though_writing_it_failed(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def emit_and_fail(console: Console, *_: object) -> None:
        Console.emit(console, {"works": True})
        raise _os_error(errno.ENOSPC)

    monkeypatch.setattr(doctor, "diagnose", lambda: emit_and_fail(click_console()))
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"works": True}


def test_exception_that_is_no_exception(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native modules written in Rust raise such."""

    class PanicException(BaseException):
        pass

    monkeypatch.setattr(doctor, "diagnose", lambda: _raise(PanicException("range end index 2")))
    result = invoke("doctor")
    assert result.exit_code == 1
    message = "error: internal error: PanicException: range end index 2 (this is a bug)\n"
    assert result.stderr == message + HINT_BUG


def click_console() -> Console:
    return click.get_current_context().ensure_object(Console)


def _document(text: str, status: int) -> str:
    """What standard output holds in JSON where standard error holds this text."""
    said = dict(line.split(": ", 1) for line in text.strip().splitlines())
    error = {"message": said["error"], "hint": said.get("hint"), "exit_status": status}
    return json.dumps({"error": error}, indent=2) + "\n"


def _raise(error: BaseException) -> None:
    raise error
