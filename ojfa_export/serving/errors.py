"""Refusals in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ojfa_export.errors import BundleError, OjfaError, OverloadedError, UsageError

# By status, as OpenAI's clients know them.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class HttpError(Exception):
    """A refusal.

    Args:
        status: Of HTTP.
        message: What is wrong and what to do, in a sentence or two.
        param: The field of the body that is wrong.
        code: A short name of what is wrong.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as an object of JSON."""
        kind = _TYPES.get(self.status, "server_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(_writable(self.body()), self.status, self.headers)


def _writable(value: Any) -> Any:
    """Text of a client may hold halves of characters, which no UTF-8 has."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {name: _writable(each) for name, each in value.items()}
    return value


def refused(field: str, why: str) -> HttpError:
    """A field of the body that can't be honoured."""
    return HttpError(400, f"{field}: {why}", param=field, code="unsupported_value")


def draining() -> HttpError:
    """The server ends and takes nothing more."""
    return HttpError(
        503,
        "the server is ending and takes no more requests; ask another one",
        code="draining",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def of_engine(error: OjfaError, param: str | None = None) -> HttpError:
    """What the engine refuses, or failed with."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, OverloadedError):
        text = f"{error.message}; try again later"
        return HttpError(429, text, code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, UsageError | BundleError):
        return HttpError(400, message, param=param or _field(error.message))
    return HttpError(500, message, code="engine_error")


def _field(message: str) -> str | None:
    """The field that an engine's message begins with, or is about."""
    first = message.split(" ", 1)[0].replace("-", "_").rstrip(":")
    known = {"temperature", "top_k", "top_p", "min_p", "logit_bias", "stop_token_ids", "exit"}
    if first in known:
        return first
    if message.startswith("speculation") or "combined with speculation" in message:
        return "speculate"
    return "prompt" if message.startswith("the prompt") else None
