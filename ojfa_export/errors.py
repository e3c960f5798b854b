"""The errors that users see: a sentence that says what and where, and a hint what to do."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of the command line."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    VERIFICATION = 3
    INTERRUPTED = 130
    # What a shell reports of `cat` when its reader has gone (128 + SIGPIPE), so that scripts know
    # it from a failure.
    READER_GONE = 141


class OjfaError(Exception):
    """A problem that the user can act on.

    Args:
        message: One sentence: what is wrong, and where.
        hint: What to do about it.
    """

    exit_status = ExitStatus.FAILURE

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OjfaError):
    """An argument that can't be right whatever the files hold."""

    exit_status = ExitStatus.USAGE


class CheckpointError(OjfaError):
    """A checkpoint that is incomplete, damaged or of a kind that is not supported."""


class CalibrationError(OjfaError):
    """Calibration text or statistics that can't give a shortcut."""


class LogError(OjfaError):
    """A log of requests that can't be replayed."""


class BundleError(OjfaError):
    """A bundle that is incomplete, altered, or of another version."""


class BackendError(OjfaError):
    """A backend that is missing, or that can't run what it was given."""


class OverloadedError(OjfaError):
    """More requests than the engine's queue holds; the same one may be taken later."""


class VerificationError(OjfaError):
    """Results that differ from the reference by more than the tolerance."""

    exit_status = ExitStatus.VERIFICATION
