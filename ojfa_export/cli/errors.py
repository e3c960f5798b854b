"""Errors as users see them: `error: what and where`, `hint: what to do`, and an exit status."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import click

from ojfa_export.cli.console import Console
from ojfa_export.errors import ExitStatus, OjfaError


class Interrupted(OjfaError):
    """The user interrupted something that can be gone on with."""

    exit_status = ExitStatus.INTERRUPTED


class ReaderGone(OjfaError):
    """Nobody reads what is written any more: no failure, and nobody to tell."""

    exit_status = ExitStatus.READER_GONE


@contextmanager
def noticing_readers() -> Iterator[None]:
    """Gives a broken pipe its own name, before click ends the program for it in its own way.

    Raises:
        ReaderGone: A reader has gone.
    """
    try:
        yield
    except BrokenPipeError:
        raise ReaderGone("the reader has gone") from None


@contextmanager
def resumable() -> Iterator[None]:
    """Tells a user who interrupts this that nothing finished is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted", hint="run the same command again to go on where it stopped"
        ) from None


class Description(NamedTuple):
    """An error in words."""

    message: str
    hint: str | None
    exit_status: int


def report(error: BaseException, console: Console) -> int:
    """Writes an error to standard error and, in JSON, to standard output.

    Returns:
        The exit status that it means.
    """
    if isinstance(error, click.Abort):  # what click makes of an interrupt
        error = error.__cause__ or error
    if isinstance(error, ReaderGone | BrokenPipeError):
        return ExitStatus.READER_GONE
    described = describe(error)
    # What can't be written is nothing more to report: the status says it.
    with contextlib.suppress(OSError):
        _tell(error, described, console)
    if console.json and not console.emitted:
        with contextlib.suppress(OSError):
            console.emit({"error": described._asdict()})
    return described.exit_status


def _tell(error: BaseException, described: Description, console: Console) -> None:
    if console.debug:
        import traceback

        console.complain("".join(traceback.format_exception(error)).rstrip("\n"))
    console.complain(_one_line(described.message), "error:")
    if described.hint:
        console.complain(_one_line(described.hint), "hint:")


def _one_line(text: str) -> str:
    """Names may hold newlines; an error is one line all the same."""
    return text.replace("\n", "\\n")


def describe(error: BaseException) -> Description:
    """Puts an error into words."""
    if not isinstance(error, Interrupted) and _is_from_interrupt(error):
        return Description("interrupted", None, ExitStatus.INTERRUPTED)
    if isinstance(error, OjfaError):
        return Description(error.message, error.hint, error.exit_status)
    if isinstance(error, click.ClickException):
        return _describe_click(error)
    if isinstance(error, MemoryError):
        return Description("out of memory", "use a machine with more", ExitStatus.FAILURE)
    if isinstance(error, OSError) and error.errno is not None:
        known = _describe_os(error)
        if known is not None:
            return known
    return Description(
        f"internal error: {type(error).__name__}: {error} (this is a bug)",
        "run it again with --debug and report what it prints",
        ExitStatus.FAILURE,
    )


def _is_from_interrupt(error: BaseException | None) -> bool:
    """Whether it began as an interrupt: native modules make it an ImportError while they load."""
    while error is not None and not isinstance(error, KeyboardInterrupt | click.Abort):
        error = error.__cause__ or error.__context__
    return error is not None


def _describe_click(error: click.ClickException) -> Description:
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"see '{context.command_path} --help'" if context else None
    return Description(message, hint, error.exit_code)


def _describe_os(error: OSError) -> Description | None:
    """Failures of the file system that are no bug of this program, or None."""
    if error.errno == errno.ENOSPC:
        where = error.filename or "the device that is written to"
        hint = "free some room and run the same command again"
        return Description(f"no space left on {where}", hint, ExitStatus.FAILURE)
    if error.errno in (errno.EFBIG, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return Description(
            f"the file size limit or quota is reached{where}",
            "raise it ('ulimit -f', 'quota'), or write elsewhere, and run the same command again",
            ExitStatus.FAILURE,
        )
    if error.filename is None or error.strerror is None:
        return None
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return Description(
        f"can't use {error.filename}: {reason}",
        "check the path and its permissions",
        ExitStatus.FAILURE,
    )
