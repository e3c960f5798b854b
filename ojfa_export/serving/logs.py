"""One line of JSON for each request, on standard error."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from typing import Any

_LOG = logging.getLogger("ojfa_export.serving")
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def write_to_standard_error() -> None:
    """Sends the lines there; without it they go where the program's logging is set up to."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _LOG.handlers, _LOG.propagate = [handler], False
    _LOG.setLevel(logging.INFO)


def tell(event: str, **fields: Any) -> None:
    """Writes a line."""
    if _LOG.isEnabledFor(logging.INFO):
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{now % 1 * 1000:03.0f}Z"
        given = {name: value for name, value in fields.items() if value is not None}
        _LOG.info("%s", json.dumps({"time": stamp, "event": event, **given}, default=str))


def failure(error: BaseException, **fields: Any) -> None:
    """Writes a line of what is a bug of the server, with where it happened."""
    _LOG.error("%s", json.dumps({"event": "failed", "error": repr(error), **fields}))
    _LOG.error("the traceback of %r", error, exc_info=error)


def request_id(given: bytes | None) -> str:
    """The id that a client gave, if it is one, or a new one."""
    if given is not None and _ID.fullmatch(given):
        return given.decode()
    return secrets.token_hex(12)
