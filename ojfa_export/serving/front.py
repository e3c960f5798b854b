"""What every request of HTTP meets first: an id, a key, a count and a line in the log."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ojfa_export.serving import logs
from ojfa_export.serving.errors import HttpError
from ojfa_export.serving.keys import Keys
from ojfa_export.serving.metrics import Metrics
from ojfa_export.serving.page_files import FILES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Looked at by machines that have no key; a browser has one only when the page has asked for it.
_OPEN = {"/health", "/metrics", "/version", "/openapi.json", *FILES}
_QUIET = {"/health", "/metrics"}


class Front:
    """A middleware of ASGI.

    Args:
        app: What answers.
        keys: One of them must come along.
        metrics: Counts answers.
        paths: Those that exist: metrics name no others.

    Attributes:
        open: Requests that are being answered.
    """

    def __init__(self, app: Application, keys: Keys, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._keys, self._metrics, self._paths = app, keys, metrics, paths
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, path = time.perf_counter(), 0, scope["path"]
        headers = dict(scope["headers"])
        id = logs.request_id(headers.get(b"x-request-id"))
        facts: dict[str, Any] = {}
        # Bodies of streams are given to the server itself: what is between only looks at starts.
        scope["ojfa"] = {"id": id, "facts": facts, "send": send}

        async def marked(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        self.open += 1
        try:
            if path in _OPEN or self._keys.accept(headers.get(b"authorization")):
                await self._app(scope, receive, marked)
            else:
                await _no_key().response()(scope, receive, marked)
        finally:
            self.open -= 1
            self._metrics.count(path if path in self._paths else "other", status)
            if path not in _QUIET:
                seconds = round(time.perf_counter() - begun, 6)
                logs.tell(
                    "request", id=id, method=scope["method"], path=path[:200], status=status,
                    seconds=seconds, **facts,
                )  # fmt: skip


def _no_key() -> HttpError:
    return HttpError(
        401,
        "send a key of this server as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
