"""Commands run as if by a fresh process: with a limit of time and of memory, all they say kept."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10.0  # on a machine that isn't busy with other things
MEMORY = 4 << 30  # address space
OUTPUT = 64 << 20  # largest file that may be written


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: Exit status; -N where signal N ended it, None where it was out of time.
    """

    command: str
    status: int | None
    stdout: str
    stderr: str


def run_cli(*arguments: str, seconds: float = SECONDS) -> Outcome:
    """Runs `ojfa-export` with these arguments."""

    def body() -> None:
        from ojfa_export.cli.app import app

        app.main(list(arguments))

    return run_forked("ojfa-export " + " ".join(map(repr, arguments)), body, seconds)


def run_forked(command: str, body: Callable[[], None], seconds: float = SECONDS) -> Outcome:
    """Runs a function in a fork of this process, whose imports are done.

    Args:
        command: What it is called in the outcome.
        body: What to run; what it raises is shown as the interpreter would.
        seconds: After which it is killed, with all that it started.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if process == 0:
            _be_child(body, out.fileno(), err.fileno())
        descriptor = os.pidfd_open(process)
        try:
            ended, _, _ = select.select([descriptor], [], [], _patience(seconds))
        finally:
            os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(status) if ended else None
        return Outcome(command, code, _text(out), _text(err))


def run_program(arguments: Sequence[str], seconds: float = SECONDS) -> Outcome:
    """Runs another program; sanitizers limit resident memory, which they take address space for."""
    command = " ".join([Path(arguments[0]).name, arguments[1], "…", *arguments[-4:]])
    sanitized = _is_sanitized(arguments[0])
    options = f"hard_rss_limit_mb={MEMORY >> 20}:allocator_may_return_null=1"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            status: int | None = subprocess.run(
                arguments,
                env={**os.environ, "ASAN_OPTIONS": options},
                preexec_fn=None if sanitized else _limit_memory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=_patience(seconds),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        return Outcome(command, status, _text(out), _text(err))


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@functools.cache
def _is_sanitized(program: str) -> bool:
    return b"__asan_init" in Path(program).read_bytes()


def _patience(seconds: float) -> float:
    """A limit of time as it is where more processes want to run than there are cores."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def _be_child(body: Callable[[], None], out: int, err: int) -> None:
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), "utf-8")
        sys.stderr = io.TextIOWrapper(
            os.fdopen(2, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True
        )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory()
        resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))
        body()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # as the interpreter ends: a panic of Rust is no Exception
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _text(file: io.BufferedRandom) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "backslashreplace")


def preload() -> None:
    """Imports what commands import, once for all that are forked; starts no threads."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import safetensors  # noqa: F401

    from ojfa_export.cli.app import COMMANDS, app

    for name in COMMANDS:
        app.get_command(None, name)  # type: ignore[arg-type]
    import ojfa_export.compiler.add_engines
    import ojfa_export.compiler.pipeline
    import ojfa_export.runtime.model
    import ojfa_export.verify.blocks
    import ojfa_export.verify.verify  # noqa: F401

    _hasten_builds()


def _hasten_builds() -> None:
    """Leaves out what takes most of a tiny build's time and changes neither files nor errors."""
    from ojfa_export.compiler import exits, statistics_stage
    from ojfa_export.compiler.report import figures

    for name in ("precision_by_exit", "surprisal_by_exit", "precision_matrix"):
        setattr(figures, name, lambda report: b"no picture")
    exits.SECONDS = statistics_stage.SECONDS = 0.2  # of timing steps, to plan the default


def is_program(path: Path | None) -> bool:
    """Whether there is a program at this path."""
    return path is not None and os.access(path, os.X_OK)
